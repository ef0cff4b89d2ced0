/** A card per video: live preview, progress, and what can be done with the result. */

import { contentUrl } from './api.js';
import { canCondition, extend, extensionText, sameAgain, useLastFrame, useSettings } from './actions.js';
import { loopingVideo, releaseMedia } from './clips.js';
import { confirmed } from './dialogs.js';
import { $, button, h, replace } from './dom.js';
import { duration, plural } from './format.js';
import { cancel, deleteVideo, hasEnded, jobs } from './jobs.js';
import { modelName } from './models.js';

const SMALL = 128; // pixels; narrower videos are enlarged with each pixel a square

const cards = new Map();
const list = $('#videos');

/** Keep a card for each video that is known, newest first. */
export function startCards() {
  addEventListener('models-loaded', () => cards.forEach((card) => card.showButtons(card.video)));
  jobs.addEventListener('video', ({ detail }) => show(detail));
  jobs.addEventListener('preview', ({ detail }) => cards.get(detail.id)?.preview(detail));
  jobs.addEventListener('deleted', ({ detail }) => {
    const card = cards.get(detail);
    cards.delete(detail);
    if (card) releaseMedia(card.element);
    card?.element.remove();
    $('#no-videos').hidden = cards.size > 0;
  });
}

function show(video) {
  let card = cards.get(video.id);
  if (!card) {
    card = new Card(video);
    cards.set(video.id, card);
    const newer = [...list.children].find((other) => Number(other.dataset.created) <= video.created_at);
    list.insertBefore(card.element, newer ?? null);
    $('#no-videos').hidden = true;
  }
  card.update(video);
}

/** The picture of a video: nothing yet, its live preview, or the video itself. */
export class Picture {
  constructor(video, { controls = true } = {}) {
    this.controls = controls;
    this.element = h('div', { class: 'picture' });
    if (video.width <= SMALL) this.element.dataset.small = '';
    this.element.style.aspectRatio = `${video.width} / ${video.height}`;
    this.shown = null;
  }

  preview({ image, step }, prompt) {
    if (this.shown === 'video' || !image.startsWith('data:image/')) return;
    if (this.shown !== 'preview') {
      this.image = h('img', { class: 'preview' });
      replace(this.element, this.image);
      this.shown = 'preview';
    }
    this.image.src = image;
    this.image.alt = `Preview at step ${step}: ${prompt}`;
  }

  update(video) {
    if (video.status === 'completed' && this.shown !== 'video') {
      const poster = contentUrl(video.id, 'thumbnail');
      releaseMedia(this.element);
      replace(
        this.element,
        loopingVideo(contentUrl(video.id), video.prompt, {
          controls: this.controls,
          poster,
          width: video.width,
          height: video.height,
        }),
      );
      this.shown = 'video';
    }
    this.element.dataset.status = video.status;
  }
}

class Card {
  constructor(video) {
    this.picture = new Picture(video);
    this.status = h('p', { class: 'status' });
    this.progress = h('progress', { max: 100, 'aria-label': `Progress of: ${video.prompt}` });
    this.message = h('p', { class: 'error' });
    this.note = h('p', { class: 'hint', role: 'status' });
    this.warnings = h('ul', { class: 'warnings' });
    this.buttons = h('div', { class: 'buttons' });
    this.element = h(
      'article',
      {
        class: 'card',
        'data-video-id': video.id,
        'data-created': video.created_at,
        'aria-label': video.prompt,
      },
      this.picture.element,
      h(
        'div',
        { class: 'about' },
        h('p', { class: 'prompt' }, video.prompt),
        h('p', { class: 'hint' }, facts(video)),
        this.status,
        this.progress,
        this.message,
        this.note,
        this.warnings,
        this.buttons,
      ),
    );
  }

  preview(preview) {
    this.picture.preview(preview, this.video.prompt);
  }

  update(video) {
    const before = this.video;
    this.video = video;
    this.picture.update(video);
    this.element.dataset.status = video.status;
    this.status.textContent = statusText(video);
    this.progress.hidden = hasEnded(video);
    this.progress.value = video.progress;
    this.message.textContent = video.error?.message ?? '';
    if (video.warnings.length !== this.warnings.childElementCount) {
      replace(
        this.warnings,
        video.warnings.map((warning) => h('li', {}, warning)),
      );
    }
    if (!before || hasEnded(before) !== hasEnded(video)) this.showButtons(video);
  }

  showButtons(video) {
    const hadFocus = this.buttons.contains(document.activeElement);
    replace(
      this.buttons,
      buttonsOf(video, (action) => () => this.attempt(action)),
    );
    if (hadFocus) this.buttons.querySelector('a, button')?.focus();
  }

  async attempt(action) {
    this.message.textContent = '';
    try {
      const note = await action(this.video);
      this.note.textContent = typeof note === 'string' ? note : '';
    } catch (error) {
      this.message.textContent = error.message;
    }
  }
}

function buttonsOf(video, attempt) {
  const { id } = video;
  if (!hasEnded(video))
    return [
      button(
        'Cancel',
        attempt(() => cancel(id)),
      ),
    ];
  const again = button('Same again with another seed', attempt(sameAgain));
  const settings = button(
    'Use these settings',
    attempt(() => useSettings(video.settings)),
  );
  const remove = button(
    'Remove',
    attempt(() => deleteVideo(id)),
  );
  if (video.status !== 'completed') return [again, settings, remove];
  const conditioning = canCondition(video)
    ? [
        button('Extend', attempt(extend), { title: `Makes ${extensionText(video)}` }),
        button('Use last frame', attempt(useLastFrame)),
      ]
    : [];
  return [
    h('a', { class: 'button', href: contentUrl(id, 'video', true), download: true }, 'Download'),
    again,
    ...conditioning,
    settings,
    button('Remove', attempt(removeFinished)),
  ];
}

/** Delete a finished video, if that is confirmed. */
async function removeFinished({ id, prompt }) {
  const question = 'Remove this video?';
  if (await confirmed(question, `“${prompt}”: the video is deleted from the disk.`, 'Remove'))
    await deleteVideo(id);
}

const facts = (video) =>
  [
    modelName(video.model),
    `seed ${video.seed}`,
    `${video.width} × ${video.height}`,
    plural(video.num_frames, 'frame'),
    `${video.seconds} s`,
  ].join(' · ');

/** Return the state of a video in words. */
export function statusText({ status, position, step, steps, eta_seconds, started_at, completed_at }) {
  if (status === 'queued')
    return position ? `Queued: ${plural(position, 'video')} before it` : 'Queued: next';
  if (status === 'in_progress') {
    const left = eta_seconds === null ? '' : `, ${duration(eta_seconds)} left`;
    return step ? `Step ${step} of ${steps}${left}` : 'Starting';
  }
  if (status === 'completed')
    return started_at && completed_at ? `Made in ${duration(completed_at - started_at)}` : 'Finished';
  return status === 'failed' ? 'Failed' : 'Cancelled';
}
