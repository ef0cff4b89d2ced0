/** The models that the server offers, and what the form shows for each. */

import { get } from './api.js';
import { $, $$, h, replace } from './dom.js';
import { plural, short } from './format.js';

export const OTHER_SIZE = 'other';

const models = new Map();

/** Load the models; the chosen one stays chosen. Returns the id of the default one. */
export async function loadModels() {
  const { data } = await get('/v1/models');
  const select = $('#model');
  const chosen = select.value;
  models.clear();
  for (const model of data) models.set(model.id, model);
  dispatchEvent(new Event('models-loaded'));
  const usable = data.filter((model) => !model.error);
  const broken = data.filter((model) => model.error);
  replace(
    select,
    usable.map((model) => h('option', { value: model.id }, title(model))),
    broken.map((model) =>
      h('option', { value: model.id, disabled: true }, `${title(model)}: ${model.error}`),
    ),
  );
  if (usable.some((model) => model.id === chosen)) select.value = chosen;
  return (usable.find((model) => model.default) ?? usable[0])?.id ?? null;
}

/** Return a model by its id, or undefined. */
export const modelOf = (id) => models.get(id);

/** Return the name of a model for people. */
export const modelName = (id) => models.get(id)?.name ?? id;

/** Whether a model records that it was trained on a size; true for one that records none. */
export const isTrained = ({ trained_sizes, defaults }, width, height) =>
  !trained_sizes.length ||
  [...trained_sizes, defaults].some((one) => one.width === width && one.height === height);

/** Offer the sizes that a model was trained on, or any size. */
export function showSizes(model, any) {
  replace($('#size'), sizeOptions(model, any || !model.trained_sizes.length));
}

/** Show only what a model can do: lengths, steps, guidance, conditioning frames. */
export function showModel(model) {
  const { defaults } = model;
  for (const name of ['width', 'height']) $(`#${name}`).step = model.multiple;
  replace(
    $('#lengths'),
    model.lengths.map(({ num_frames, seconds, trained }) =>
      h('option', { value: num_frames }, `${short(seconds)} s${trained ? ', trained' : ''}`),
    ),
  );
  const can = {
    negative_prompt: !model.guidance_range,
    guidance_rescale: !model.guidance_range,
    conditioning: model.conditioning,
  };
  for (const element of $$('[data-needs]')) {
    element.hidden = !can[element.dataset.needs];
    if (element.matches('fieldset')) element.disabled = element.hidden;
    for (const control of $$('input, textarea', element)) control.disabled = element.hidden;
  }
  const [low, high] = model.guidance_range ?? [0, ''];
  Object.assign($('#guidance_scale'), { min: low, max: high });
  $('#guidance-hint').textContent = model.guidance_range
    ? `This model learned ${short(low)} to ${short(high)}.`
    : '1: no guidance; larger values follow the prompt more closely, at twice the cost.';
  $('#steps-hint').textContent = model.trained_steps
    ? `This model learned ${model.trained_steps.join(', ')} steps.`
    : '';
  $('#solver').options[0].textContent = defaults.solver
    ? `of the model (${defaults.solver})`
    : 'of the model';
  $('#model-hint').textContent = [
    model.step === null || model.step === undefined ? '' : `${plural(model.step, 'training step')}.`,
    model.trigger ? `Prompts of this model contain “${model.trigger}”.` : '',
  ].join(' ');
}

/** Return the value of the size field for a width and a height. */
export function sizeValue(width, height) {
  const value = `${width}x${height}`;
  return $$('#size option').some((option) => option.value === value) ? value : OTHER_SIZE;
}

function sizeOptions(model, any) {
  const { width, height } = model.defaults;
  const seen = new Set();
  const option = (one, label) => {
    const value = `${one.width}x${one.height}`;
    if (seen.has(value)) return null;
    seen.add(value);
    return h('option', { value }, `${one.width} × ${one.height}${label}`);
  };
  const name = (one) => (one.resolution ? ` (${one.resolution}, ${one.aspect_ratio})` : '');
  const trained = [...model.resolutions.filter((one) => one.trained), ...model.trained_sizes];
  const rest = Map.groupBy(
    model.resolutions.filter((one) => !one.trained),
    (one) => one.resolution,
  );
  const group = (label, options) => {
    const shown = options.filter(Boolean);
    return shown.length ? h('optgroup', { label }, shown) : null;
  };
  const trainedOn = [
    group(
      'Trained on',
      trained.map((one) => option(one, name(one))),
    ),
    group('Default of the model', [option({ width, height }, '')]),
  ];
  if (!any) return trainedOn;
  return [
    ...trainedOn,
    ...[...rest].map(([label, sizes]) =>
      group(
        label,
        sizes.map((one) => option(one, `, ${one.aspect_ratio}`)),
      ),
    ),
    h('option', { value: OTHER_SIZE }, 'another width and height'),
  ];
}

const title = (model) => (model.default ? `${model.name} (default)` : model.name);
