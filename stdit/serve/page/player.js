/** A video of the gallery in a dialog, with its settings. */

import { get, path, remove } from './api.js';
import { $, announce, button, definitions, h, reducedMotion, replace } from './dom.js';
import { closeByBackdrop, confirmed } from './dialogs.js';
import { bytes, count, date, plural } from './format.js';
import { inspectionOf } from './inspection.js';

const dialog = $('#player');

/** Empty the dialog when it is closed, so that its video stops. */
export function startPlayer() {
  closeByBackdrop(dialog);
  dialog.addEventListener('close', () => dialog.replaceChildren());
}

/** Play a video of the gallery; calls back when it was deleted. */
export async function playVideo(item, deleted) {
  const address = path('v1', 'gallery', item.id);
  const settings = h('div', {}, h('p', { class: 'hint' }, 'Reading its settings …'));
  const failure = h('p', { class: 'error', role: 'alert' });
  const erase = button(
    'Delete',
    async () => {
      const question = await confirmed(
        'Delete this video?',
        `${item.name} and its settings are deleted from the disk.`,
        'Delete',
      );
      if (!question) return;
      try {
        await remove(address);
        dialog.close();
        announce(`${item.name} is deleted.`);
        deleted();
      } catch (error) {
        failure.textContent = error.message;
      }
    },
    { class: 'danger' },
  );
  const video = h('video', {
    controls: true,
    muted: true,
    loop: true,
    autoplay: !reducedMotion(),
    playsInline: true,
    width: item.width,
    height: item.height,
    'aria-label': item.prompt,
    src: `${address}/content`,
  });
  replace(
    dialog,
    h(
      'header',
      {},
      h('h2', { id: 'player-heading' }, item.prompt || item.name),
      button('Close', () => dialog.close(), { autofocus: true }),
    ),
    video,
    definitions([
      ['file', item.folder ? `${item.folder}/${item.name}` : item.name],
      ['made', date(item.created)],
      [
        'checkpoint',
        item.checkpoint_step === null
          ? item.checkpoint
          : `${item.checkpoint}, step ${count(item.checkpoint_step)}`,
      ],
      ['length', item.num_frames && `${plural(item.num_frames, 'frame')} at ${item.fps} frames per second`],
      ['file size', bytes(item.bytes)],
    ]),
    h(
      'div',
      { class: 'buttons' },
      h('a', { class: 'button', href: `${address}/content?download=1`, download: true }, 'Download'),
      erase,
    ),
    failure,
    h('h3', {}, 'Settings'),
    settings,
  );
  dialog.showModal();
  dialog.scrollTop = 0;
  try {
    const found = await get(`${address}/settings`);
    replace(
      settings,
      inspectionOf(found, () => dialog.close()),
    );
  } catch (error) {
    replace(settings, h('p', { class: 'error' }, error.message));
  }
}
