/** Start a training run from a config: the report of the dry run first. */

import { get, path, post } from './api.js';
import { $, $$, announce, h, replace } from './dom.js';
import { clearErrors, showError } from './errors.js';

const POLL_MS = 1000;

const form = $('#launch-form');
const dryRun = $('#dry-run');
const start = $('#start-training');
const report = $('#launch-report');
let configs = new Map();
let asked = 0;

/** Load the configs, and let the form start runs; `isShown` shows the run of a name, and returns whether it can. */
export function startLaunches(isShown) {
  form.addEventListener('input', forget);
  form.elements.config.addEventListener('change', showSummary);
  dryRun.addEventListener('click', runDry);
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    if (!start.disabled) train(isShown);
  });
  $('#launch-panel').addEventListener('toggle', loadConfigs, { once: true });
}

/** Ask for a launch until it has ended or `isEnough` is true of it; returns it as it was last. */
export async function followLaunch(launch, isEnough) {
  let last = launch;
  while (last.state === 'running' && !(await isEnough(last))) {
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    last = await get(path('v1', 'launches', launch.id));
  }
  return last;
}

async function loadConfigs() {
  try {
    const { data, overrides = {}, allow_training: allowed = true } = await get('/v1/configs');
    configs = new Map(data.map((config) => [config.name, config]));
    replace(
      form.elements.config,
      data.map(({ name }) => h('option', { value: name }, name)),
    );
    replace(
      $('#overrides'),
      Object.entries(overrides)
        .filter(([name]) => name !== 'trainer.steps')
        .map(overrideField),
    );
    $('#launch-more').hidden = !$('#overrides').childElementCount;
    if (!allowed)
      showError(form, { message: 'This server was started so that nothing can be trained from the page.' });
    for (const control of [...form.elements]) control.disabled = !allowed || control === start;
    showSummary();
  } catch (error) {
    showError(form, error);
  }
}

function overrideField([name, kind]) {
  const id = `override-${name.replaceAll('.', '-')}`;
  const attributes =
    kind === 'run'
      ? { autocomplete: 'off' }
      : { type: 'number', step: kind === 'number' ? 'any' : 1, min: 0 };
  return h(
    'div',
    { class: 'field' },
    h('label', { for: id }, name),
    h('input', {
      id,
      name: 'overrides',
      'data-override': name,
      'data-param-name': `overrides.${name}`,
      ...attributes,
    }),
  );
}

async function runDry() {
  const number = (asked += 1);
  const isOld = () => number !== asked;
  clearErrors(form);
  start.disabled = true;
  dryRun.disabled = true;
  showReport('The dry run is starting …');
  try {
    const launch = await followLaunch(await post('/v1/launches', { ...body(), dry_run: true }), (now) => {
      if (now.report && !isOld()) showReport(now.report);
      return isOld();
    });
    if (isOld()) return;
    showReport(launch.report);
    start.disabled = launch.state !== 'done';
    announce(
      start.disabled
        ? 'The dry run failed: see its report.'
        : 'The dry run is done: the training can be started.',
    );
  } catch (error) {
    report.hidden = true;
    showError(form, error);
  } finally {
    if (!isOld()) dryRun.disabled = false;
  }
}

async function train(isShown) {
  const number = (asked += 1);
  const order = body();
  start.disabled = true;
  clearErrors(form);
  try {
    const launch = await followLaunch(await post('/v1/launches', order), async (now) => {
      if (number === asked && now.report) showReport(now.report);
      return isShown(order.name);
    });
    if (number === asked && launch.report) showReport(launch.report);
    announce(
      launch.state === 'failed' ? `${order.name} failed: see its report.` : `${order.name} is started.`,
    );
  } catch (error) {
    showError(form, error);
  }
}

/** A report is only of the settings that it was made for. */
function forget() {
  asked += 1;
  start.disabled = true;
  dryRun.disabled = false;
}

function body() {
  const { config, name, steps } = form.elements;
  const set = $$('[data-override]', form).filter(({ value }) => value.trim());
  const overrides = Object.fromEntries(
    set.map((input) => [
      input.dataset.override,
      input.type === 'number' ? Number(input.value) : input.value.trim(),
    ]),
  );
  return {
    config: config.value,
    name: name.value.trim(),
    ...(steps.value ? { steps: Number(steps.value) } : {}),
    ...(set.length ? { overrides } : {}),
  };
}

function showReport(text) {
  report.hidden = false;
  report.textContent = text;
}

function showSummary() {
  const { summary, missing } = configs.get(form.elements.config.value) ?? {};
  $('#config-hint').textContent = [summary, missing && `It cannot be started: ${missing}.`]
    .filter(Boolean)
    .join(' ');
}
