/** A grid over two settings: a video for each combination, in a labelled table. */

import { post } from './api.js';
import { statusText, Picture } from './cards.js';
import { pauseButton, releaseMedia } from './clips.js';
import { $, h, replace } from './dom.js';
import { clearErrors, showFieldError } from './errors.js';
import { findVideo, hasEnded, jobs, submit } from './jobs.js';
import { nextSeed } from './seed.js';
import { readPrompts, readSettings } from './settings.js';

const MOST_VIDEOS = 64;
const STORED = 'stdit-grid';
const SETTINGS = {
  guidance_scale: 'Guidance scale',
  seed: 'Seed',
  num_inference_steps: 'Steps',
  solver: 'Solver',
  cache: 'Cache',
  num_frames: 'Length in frames',
  shift: 'Shift',
  guidance_rescale: 'Guidance rescale',
  refine_pairs: 'Refinement pairs',
  refine_level: 'Refinement level',
  refine_guidance_scale: 'Refinement guidance scale',
};

const form = $('#grid-form');
const container = $('#grid');
const pause = pauseButton();
const cells = new Map();

/** Let the form submit grids, and show the last grid of this browser tab. */
export function startGrid() {
  const options = () => Object.entries(SETTINGS).map(([name, label]) => h('option', { value: name }, label));
  replace(form.elements.rows, options());
  replace(form.elements.columns, options());
  form.elements.columns.value = 'seed';
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    makeGrid();
  });
  jobs.addEventListener('video', ({ detail }) => cells.get(detail.id)?.update(detail));
  jobs.addEventListener('preview', ({ detail }) => cells.get(detail.id)?.preview(detail));
  const stored = JSON.parse(sessionStorage.getItem(STORED) ?? 'null');
  if (stored) restore(stored);
}

async function makeGrid() {
  clearErrors(form);
  const rows = axis('rows', 'row_values');
  const columns = axis('columns', 'column_values');
  const prompt = readPrompts()[0];
  const wrong = problem(rows, columns, prompt);
  if (wrong) {
    showFieldError(form.elements[wrong.control], wrong.message);
    form.elements[wrong.control].focus();
    return;
  }
  const body = { ...readSettings(), prompt, seed: nextSeed() };
  if (await refused(body, rows, columns, 'row_values')) return;
  if (await refused(body, columns, rows, 'column_values')) return;
  const grid = { rows, columns, prompt, ids: [] };
  draw(grid);
  for (const [index, cell] of [...container.querySelectorAll('td')].entries()) {
    const row = rows.values[Math.floor(index / columns.values.length)];
    const column = columns.values[index % columns.values.length];
    grid.ids.push(await fill(cell, { ...body, [rows.name]: row, [columns.name]: column }));
    sessionStorage.setItem(STORED, JSON.stringify(grid));
  }
}

/** Check the values of one axis, beside the first one of the other; show what is refused at their control. */
async function refused(body, { name, values }, other, control) {
  const beside = { ...body, [other.name]: other.values[0] };
  try {
    await Promise.all(values.map((value) => post('/v1/estimate', { ...beside, [name]: value })));
    return false;
  } catch (error) {
    showFieldError(form.elements[control], error.message);
    form.elements[control].focus();
    return true;
  }
}

async function fill(cell, body) {
  try {
    const video = await submit(body);
    follow(cell, video);
    return video.id;
  } catch (error) {
    replace(cell, h('p', { class: 'error' }, error.message));
    return null;
  }
}

async function restore(grid) {
  $('#grid-panel').open = true;
  draw(grid);
  const drawn = [...container.querySelectorAll('td')];
  for (const [index, id] of grid.ids.entries()) {
    const video = id && (await findVideo(id).catch(() => null));
    if (video) follow(drawn[index], video);
    else replace(drawn[index], h('p', { class: 'hint' }, 'not kept'));
  }
}

function draw({ rows, columns, prompt }) {
  releaseMedia(container);
  cells.clear();
  const head = h(
    'tr',
    {},
    h('th', { scope: 'col' }, `${rows.name} × ${columns.name}`),
    columns.values.map((value) => h('th', { scope: 'col' }, `${columns.name} ${value}`)),
  );
  const body = rows.values.map((value) =>
    h(
      'tr',
      {},
      h('th', { scope: 'row' }, `${rows.name} ${value}`),
      columns.values.map(() => h('td', {}, h('p', { class: 'hint' }, 'waits'))),
    ),
  );
  container.tabIndex = 0;
  $('#make-grid').after(pause);
  replace(
    container,
    h('table', { class: 'grid' }, h('caption', {}, prompt), h('thead', {}, head), h('tbody', {}, body)),
  );
}

function follow(cell, video) {
  const picture = new Picture(video, { controls: false });
  const status = h('p', { class: 'hint' });
  replace(cell, picture.element, status);
  const update = (newer) => {
    picture.update(newer);
    status.textContent = newer.error?.message ?? statusText(newer);
    if (hasEnded(newer)) cells.delete(video.id);
  };
  cells.set(video.id, { update, preview: (preview) => picture.preview(preview, video.prompt) });
  update(video);
}

function axis(name, values) {
  const texts = form.elements[values].value
    .split(',')
    .map((text) => text.trim())
    .filter(Boolean);
  const unique = [...new Set(texts)];
  return {
    name: form.elements[name].value,
    values: unique.map((text) => (Number.isFinite(Number(text)) ? Number(text) : text)),
  };
}

function problem(rows, columns, prompt) {
  const videos = rows.values.length * columns.values.length;
  if (!prompt) return { control: 'rows', message: 'prompt is empty: write one in the form first.' };
  if (rows.name === columns.name)
    return { control: 'columns', message: `rows and columns are both ${rows.name}: choose two settings.` };
  if (!rows.values.length)
    return { control: 'row_values', message: 'no values: give some, separated by commas.' };
  if (!columns.values.length)
    return { control: 'column_values', message: 'no values: give some, separated by commas.' };
  if (videos > MOST_VIDEOS)
    return {
      control: 'column_values',
      message: `${videos} videos: a grid has at most ${MOST_VIDEOS}, so give fewer values.`,
    };
  return null;
}
