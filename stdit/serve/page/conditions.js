/** Conditioning frames: pictures and clips, where they begin in the video, and how strictly they are kept. */

import { contentUrl, path, postFile } from './api.js';
import { $, announce, button, h } from './dom.js';
import { clearError, showFileError } from './errors.js';
import { plural, short } from './format.js';

const list = $('#conditions');
const drop = $('#condition-drop');
const chooser = $('#condition-file');

/** The conditions of the form: {source, name, frames, frame, length, strength, source_frame, row}. */
export const conditions = [];
let rowsMade = 0;

/** Let files be dropped or chosen. */
export function startConditions() {
  chooser.addEventListener('change', () => {
    upload([...chooser.files]);
    chooser.value = '';
  });
  acceptDrops(drop, upload);
}

/** Call back with the files that are dropped on an element; one within it may take them first. */
export function acceptDrops(element, callback) {
  const mark = (over) => element.classList.toggle('over', over);
  const take = (event, over) => {
    if (event.defaultPrevented || !event.dataTransfer.types.includes('Files')) return mark(false);
    event.preventDefault(); // or the browser would open the file in the place of this page
    return mark(over);
  };
  element.addEventListener('dragover', (event) => take(event, true));
  element.addEventListener('dragleave', () => mark(false));
  element.addEventListener('drop', (event) => {
    const isTaken = event.defaultPrevented;
    take(event, false);
    if (!isTaken && event.defaultPrevented) callback([...event.dataTransfer.files]);
  });
}

/** Return the conditions as part of a submission. */
export function readConditions() {
  if (!conditions.length) return {};
  return {
    conditions: conditions.map(({ source, frame, length, strength, source_frame }) => ({
      ...source,
      frame,
      ...(length === null ? {} : { length }),
      ...(strength === 1 ? {} : { strength }),
      ...(source_frame ? { source_frame } : {}),
    })),
  };
}

/** Show the conditions of a submission. */
export function fillConditions(filled) {
  conditions.length = 0;
  list.replaceChildren();
  for (const one of filled) addCondition(one);
}

/** Add a condition of a submission; `about` is what the server said of an upload. */
export function addCondition(
  { upload, video, frame = 0, length = null, strength = 1, source_frame = 0 },
  about = {},
) {
  const condition = {
    source: upload ? { upload } : { video },
    name: about.name ?? (video ? `Video ${video}` : `Upload ${upload}`),
    frames: about.kind === 'image' ? 1 : (about.num_frames ?? null),
    fps: about.fps ?? null,
    frame,
    length,
    strength,
    source_frame,
  };
  condition.row = rowOf(condition);
  conditions.push(condition);
  list.append(condition.row);
  changed();
}

/** Move a condition to a frame of the video; the number field follows. */
export function moveCondition(condition, frame) {
  condition.frame = frame;
  $('[name=frame]', condition.row).value = frame;
  changed();
}

/** Return how many frames of a video a condition covers, at most `total`. */
export function coveredFrames({ length, frames, fps, source_frame }, layout) {
  if (length !== null) return Math.min(length, layout.total);
  const used = frames === null ? 1 : source_frame < 0 ? -source_frame : Math.max(1, frames - source_frame);
  const scale = fps && frames > 1 ? layout.fps / fps : 1;
  return Math.max(1, Math.min(layout.total, Math.round(used * scale)));
}

async function upload(files) {
  clearError(chooser);
  for (const file of files) {
    drop.classList.add('busy');
    try {
      const about = await postFile('/v1/uploads', file);
      addCondition({ upload: about.id }, { ...about, name: about.name ?? file.name });
      announce(`${file.name} is added.`);
    } catch (error) {
      showFileError(chooser, file, error);
    }
    drop.classList.remove('busy');
  }
}

function rowOf(condition) {
  const { source, name, frames } = condition;
  const still = frames === 1;
  const id = (rowsMade += 1);
  const image = h('img', { alt: '', width: 56, height: 56, loading: 'lazy', src: thumbnailOf(source) });
  image.addEventListener('error', () => image.classList.add('missing'));
  const numberField = (label, key, attributes) =>
    h(
      'div',
      { class: 'field narrow' },
      h('label', { for: `${key}-${id}` }, label),
      h('input', {
        id: `${key}-${id}`,
        name: key,
        type: 'number',
        value: condition[key] ?? '',
        oninput: read(key),
        ...attributes,
      }),
    );
  const read = (key) => (event) => {
    const { value } = event.target;
    condition[key] = value === '' ? (key === 'length' ? null : key === 'strength' ? 1 : 0) : Number(value);
    changed();
  };
  const fields = [
    numberField('At frame', 'frame', { step: 1, title: '0: the first, -1: the last' }),
    still ? null : numberField('Length', 'length', { step: 1, min: 1, placeholder: 'all' }),
    numberField('Strength', 'strength', {
      step: 0.05,
      min: 0,
      max: 1,
      title: 'Below 1 the frames are partly regenerated',
    }),
    still ? null : numberField('From frame of the clip', 'source_frame', { step: 1, title: '-1: its last' }),
  ];
  const about =
    still || frames === null
      ? ''
      : `, ${plural(frames, 'frame')}${condition.fps ? ` at ${short(condition.fps)} fps` : ''}`;
  return h(
    'li',
    { class: 'row condition' },
    image,
    h('p', { class: 'name' }, name, h('span', { class: 'hint' }, about)),
    h('div', { class: 'fields' }, fields),
    button('Remove', () => removeCondition(condition), { 'aria-label': `Remove ${name}` }),
  );
}

function removeCondition(condition) {
  conditions.splice(conditions.indexOf(condition), 1);
  condition.row.remove();
  changed();
  chooser.focus();
}

const thumbnailOf = ({ upload, video }) =>
  upload ? path('v1', 'uploads', upload, 'thumbnail') : contentUrl(video, 'thumbnail');

const changed = () => list.dispatchEvent(new Event('change', { bubbles: true }));
