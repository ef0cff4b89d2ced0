/** The form of a video: from its controls to the body of a submission, and back. */

import { $, $$, h, replace } from './dom.js';
import { fillConditions, readConditions } from './conditions.js';
import { fillLoras, readLoras } from './loras.js';
import { OTHER_SIZE, isTrained, modelOf, showModel, showSizes, sizeValue } from './models.js';
import { fillSeed, isLocked, readSeed } from './seed.js';

const NUMBERS = [
  'num_frames',
  'num_inference_steps',
  'guidance_scale',
  'guidance_rescale',
  'shift',
  'refine_pairs',
  'refine_level',
  'refine_guidance_scale',
  'fps',
];
const WORDS = ['solver', 'guidance_schedule'];
const LISTS = ['guidance_interval', 'pab', 'pab_timesteps'];
const MOST_SEGMENT_PROMPTS = 32;

const form = $('#make-form');
const field = (name) => form.elements[name];
/** Overlaps that the server chose, by model and frames of a segment. */
const overlaps = new Map();

/** Return the model that is chosen, or undefined. */
export const chosenModel = () => modelOf(field('model').value);

/** Return the prompts, one per line. */
export const readPrompts = () =>
  field('prompt')
    .value.split('\n')
    .map((line) => line.trim())
    .filter(Boolean);

/** Return the body of a submission without prompt: what differs from the defaults of the model. */
export function readSettings() {
  const defaults = chosenModel()?.defaults ?? {};
  const body = { model: field('model').value, ...readSize(), seed: readSeed() ?? undefined };
  if (field('any_size').checked) body.any_size = true;
  if (active('negative_prompt') && field('negative_prompt').value.trim()) {
    body.negative_prompt = field('negative_prompt').value.trim();
  }
  const values = Object.fromEntries([
    ...NUMBERS.map((name) => [name, number(field(name))]),
    ...WORDS.map((name) => [name, field(name).value || null]),
    ...LISTS.map((name) => [name, list(field(name).value)]),
    ['cache', readCache()],
  ]);
  for (const [name, value] of Object.entries(values)) {
    if (active(name) && value !== null && !same(value, defaults[name])) body[name] = value;
  }
  if (!$('[data-needs=conditioning]').hidden) Object.assign(body, readSegments(), readConditions());
  return { ...body, ...readLoras() };
}

/** Fill the form from the body of a submission; what it leaves out gets the default of its model. */
export function fillSettings(body) {
  const known = modelOf(body.model);
  if (known && !known.error) field('model').value = body.model;
  const model = chosenModel();
  if (!model) return;
  showModel(model);
  if (body.model && body.model !== model.id) {
    $('#model-hint').textContent =
      `There is no model ${body.model} here, or no longer: these settings are used with ${model.name}.`;
  }
  const all = { ...model.defaults, ...withoutNulls(body) };
  if (body.prompt !== undefined) field('prompt').value = onOneLine(body.prompt);
  field('negative_prompt').value = body.negative_prompt ?? '';
  for (const name of [...NUMBERS, ...WORDS]) field(name).value = all[name] ?? '';
  for (const name of LISTS) field(name).value = (all[name] ?? []).join(', ');
  const [width, height] = body.size ? body.size.split('x') : [all.width, all.height];
  field('any_size').checked = Boolean(body.any_size) || !isTrained(model, Number(width), Number(height));
  showSize(model, width, height);
  const word = [...field('cache').options].some((option) => option.value === all.cache);
  field('cache').value = word ? all.cache : 'threshold';
  if (!word) $('#cache_threshold').value = all.cache;
  fillSeed(body.seed);
  field('segments').value = body.segments ?? 1 + (body.segment_prompts?.length ?? 0);
  field('overlap').value = body.overlap ?? '';
  field('loop').checked = Boolean(body.loop);
  showSegmentPrompts(body.segment_prompts ?? []);
  fillConditions(body.conditions ?? []);
  fillLoras(body.loras ?? []);
  form.dispatchEvent(new Event('filled'));
}

/** Return a prompt without line breaks, which would make it several prompts. */
const onOneLine = (prompt) => prompt.replace(/\s*[\r\n]+\s*/g, ' ');

/** Give all settings of the form the defaults of the chosen model; prompts and seed stay. */
export function resetToModel() {
  const kept = readSettings();
  fillSettings({
    model: kept.model,
    seed: isLocked() ? kept.seed : undefined,
    negative_prompt: field('negative_prompt').value,
    conditions: kept.conditions,
    loras: kept.loras,
    segments: kept.segments,
    segment_prompts: kept.segment_prompts,
    loop: kept.loop,
  });
}

/** Offer the sizes that the box beside them allows; the chosen one stays if it is among them. */
export function showAllowedSizes() {
  const model = chosenModel();
  if (!model) return;
  const { width, height } = readSize();
  const { defaults } = model;
  if (field('any_size').checked || isTrained(model, width, height)) showSize(model, width, height);
  else showSize(model, defaults.width, defaults.height);
}

function showSize(model, width, height) {
  showSizes(model, field('any_size').checked);
  field('width').value = width;
  field('height').value = height;
  field('size').value = sizeValue(width, height);
}

/** Keep the overlap of segments that the server chose, for the timeline. */
export function learnOverlap({ overlap }) {
  overlaps.set(overlapKey(), overlap);
}

const overlapKey = () => `${field('model').value} ${field('num_frames').value}`;

/** Return how the video is divided: frames of a segment, their number, the overlap, the length of the whole. */
export function readLayout() {
  const num_frames = Math.max(1, Number(field('num_frames').value) || 1);
  const segments = Math.max(1, Number(field('segments').value) || 1);
  const likely = overlaps.get(overlapKey()) ?? Math.max(1, Math.floor(num_frames / 4));
  const overlap = segments > 1 ? Number(field('overlap').value) || likely : 0;
  const loop = segments > 1 && field('loop').checked;
  const total = segments * (num_frames - overlap) + (loop ? 0 : overlap);
  return {
    num_frames,
    segments,
    overlap,
    loop,
    total: Math.max(1, total),
    fps: Number(field('fps').value) || 1,
  };
}

/** Show the controls that have an effect beside the others, and no other ones. */
export function showDependent() {
  const other = field('size').value === OTHER_SIZE;
  for (const element of $$('[data-other-size]', form)) element.hidden = !other;
  const threshold = $('#cache_threshold');
  threshold.closest('.field').hidden = field('cache').value !== 'threshold';
  field('guidance_interval').disabled = field('guidance_schedule').value !== 'interval';
  field('pab_timesteps').disabled = !field('pab').value.trim();
  const refined = Number(field('refine_pairs').value) > 0;
  for (const name of ['refine_level', 'refine_guidance_scale']) field(name).disabled = !refined;
  const several = Number(field('segments').value) > 1;
  for (const element of $$('[data-segments]', form)) element.hidden = !several;
  showSegmentPrompts(segmentPrompts());
}

function readSize() {
  const chosen = field('size').value;
  if (chosen === OTHER_SIZE) return { width: number(field('width')), height: number(field('height')) };
  const [width, height] = chosen.split('x').map(Number);
  return { width, height };
}

function readCache() {
  return field('cache').value === 'threshold' ? number($('#cache_threshold')) : field('cache').value;
}

function readSegments() {
  const { segments, loop } = readLayout();
  if (segments < 2)
    return Number(field('segments').value) === 1 ? {} : { segments: number(field('segments')) };
  const prompts = segmentPrompts();
  while (prompts.length && !prompts.at(-1)) prompts.pop();
  const before = (index) => prompts.slice(0, index).findLast(Boolean) ?? readPrompts()[0] ?? '';
  const body = { segments, segment_prompts: prompts.map((prompt, index) => prompt || before(index)) };
  const overlap = number(field('overlap'));
  if (!body.segment_prompts.length) delete body.segment_prompts;
  if (overlap !== null) body.overlap = overlap;
  if (loop) body.loop = true;
  return body;
}

const segmentPrompts = () => $$('#segment-prompts textarea').map((area) => area.value.trim());

function showSegmentPrompts(prompts) {
  const rows = Math.min(MOST_SEGMENT_PROMPTS, Math.max(0, (Number(field('segments').value) || 1) - 1));
  const shown = $$('#segment-prompts textarea');
  if (shown.length === rows && prompts.every((prompt, index) => shown[index]?.value.trim() === prompt))
    return;
  replace(
    $('#segment-prompts'),
    Array.from({ length: rows }, (_, index) => {
      const id = `segment-prompt-${index + 2}`;
      const area = h('textarea', {
        id,
        name: 'segment_prompts',
        rows: 1,
        placeholder: 'as the segment before',
      });
      area.value = prompts[index] ?? '';
      return h('li', { class: 'field' }, h('label', { for: id }, `Prompt of segment ${index + 2}`), area);
    }),
  );
}

/** Return the number in a control; null if it is empty; its text if it is no number, for the server's message. */
function number(control) {
  if (control.validity.badInput) return 'not a number';
  return control.value.trim() === '' ? null : Number(control.value);
}

function list(text) {
  const parts = text
    .replace(/[[\]]/g, '')
    .split(/[\s,]+/)
    .filter(Boolean);
  return parts.map((part) => (Number.isFinite(Number(part)) ? Number(part) : part));
}

const active = (name) => !field(name).disabled && !field(name).closest('[data-needs][hidden]');

const same = (value, other) => JSON.stringify(value) === JSON.stringify(other ?? null);

const withoutNulls = (body) => Object.fromEntries(Object.entries(body).filter(([, value]) => value !== null));
