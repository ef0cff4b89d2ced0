/** The timeline of a video, to scale: its segments, their overlaps, and where each conditioning clip stands. */

import { $, h, replace } from './dom.js';
import { conditions, coveredFrames, moveCondition } from './conditions.js';
import { duration, plural } from './format.js';

const MOST_SEGMENTS_DRAWN = 64;

const container = $('#timeline');

/** Draw the timeline; `layout` is that of the form, see readLayout. */
export function drawTimeline(layout) {
  const focused = conditions.findIndex(({ clip }) => clip && clip === document.activeElement);
  const { total, fps } = layout;
  const clips = conditions.map((condition, index) => clipOf(condition, index, layout));
  replace(
    container,
    h('div', { class: 'track segments', 'aria-hidden': 'true' }, segmentsOf(layout)),
    h(
      'div',
      { class: 'track clips', role: 'group', 'aria-label': 'Conditioning frames in the video' },
      clips.length ? clips : h('p', { class: 'hint' }, 'No conditioning frames.'),
    ),
    h(
      'div',
      { class: 'ruler', 'aria-hidden': 'true' },
      h('span', {}, '0'),
      h('span', {}, `frame ${total - 1}`),
    ),
    h('p', { class: 'hint' }, summary(layout), ` ${duration(total / fps)} in all.`),
  );
  if (focused >= 0) clips[focused]?.focus();
}

function segmentsOf({ num_frames, segments, overlap, loop, total }) {
  const drawn = Math.min(segments, MOST_SEGMENTS_DRAWN);
  return Array.from({ length: drawn }, (_, index) => {
    const start = index * (num_frames - overlap);
    const length = Math.min(num_frames, total - start); // the end of a loop is the beginning of its first segment
    const bar = placed(
      h('div', { class: 'segment' }, segments > 1 ? String(index + 1) : ''),
      start,
      length,
      total,
    );
    if (index > 0 || loop) bar.append(placed(h('div', { class: 'overlap' }), 0, overlap, length));
    return bar;
  });
}

function clipOf(condition, index, layout) {
  const length = coveredFrames(condition, layout);
  const last = Math.max(0, layout.total - length);
  const start = Math.min(
    last,
    Math.max(0, condition.frame < 0 ? layout.total + condition.frame : condition.frame),
  );
  const clip = h(
    'div',
    {
      class: 'clip',
      role: 'slider',
      tabindex: 0,
      'aria-label': `Start of ${condition.name}`,
      'aria-valuemin': 0,
      'aria-valuemax': last,
      'aria-valuenow': start,
      'aria-valuetext': `frame ${start} of ${layout.total}, ${plural(length, 'frame')} long`,
      title: `${condition.name}: ${plural(length, 'frame')} from frame ${start}`,
    },
    h('span', {}, String(index + 1)),
  );
  condition.clip = clip;
  clip.style.opacity = 0.45 + 0.55 * Math.min(1, Math.max(0, condition.strength));
  const move = (frame) => {
    const first = Math.min(last, Math.max(0, Math.round(frame)));
    const to = first === last && last > 0 ? first - layout.total : first;
    if (to !== condition.frame) moveCondition(condition, to);
  };
  const steps = {
    ArrowLeft: -1,
    ArrowDown: -1,
    ArrowRight: 1,
    ArrowUp: 1,
    PageUp: 10,
    PageDown: -10,
    Home: -last,
    End: last,
  };
  clip.addEventListener('keydown', (event) => {
    const step = steps[event.key];
    if (step === undefined) return;
    event.preventDefault();
    move(start + step * (event.shiftKey ? 10 : 1));
  });
  clip.addEventListener('pointerdown', (event) => drag(event, start, layout.total, last, move));
  return placed(clip, start, length, layout.total);
}

/** Follow a pointer; the track is redrawn at each frame, so that the window is listened to. */
function drag(event, start, total, last, move) {
  event.preventDefault();
  event.currentTarget.focus();
  const width = event.currentTarget.parentElement.clientWidth;
  const follow = ({ clientX }) => move(start + ((clientX - event.clientX) / width) * total);
  const stop = () => {
    removeEventListener('pointermove', follow);
    removeEventListener('pointerup', stop);
    removeEventListener('pointercancel', stop);
  };
  addEventListener('pointermove', follow);
  addEventListener('pointerup', stop);
  addEventListener('pointercancel', stop);
}

function placed(element, start, length, total) {
  element.style.left = `${(100 * start) / total}%`;
  element.style.width = `${(100 * length) / total}%`;
  return element;
}

function summary({ num_frames, segments, overlap, loop, total }) {
  if (segments === 1) return `${plural(total, 'frame')},`;
  const shared = `${plural(segments, 'segment')} of ${plural(num_frames, 'frame')} that share ${overlap}`;
  return `${shared}${loop ? ', the last leads back to the first' : ''}: ${plural(total, 'frame')},`;
}
