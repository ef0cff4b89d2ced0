/** Start a training run from a config: the report of the dry run first. */

import { get, path, post } from './api.js';
import { $, announce, h, replace } from './dom.js';
import { clearErrors, showError } from './errors.js';

const POLL_MS = 1000;

const form = $('#launch-form');
const dryRun = $('#dry-run');
const start = $('#start-training');
const report = $('#launch-report');
let asked = 0;

/** Load the configs, and let the form start runs; calls back with what the server answers. */
export function startLaunches(started) {
  form.addEventListener('input', forget);
  form.elements.config.addEventListener('change', showSummary);
  dryRun.addEventListener('click', runDry);
  form.addEventListener('submit', async (event) => {
    event.preventDefault();
    if (start.disabled) return;
    start.disabled = true;
    clearErrors(form);
    try {
      started(await post('/v1/launches', body()));
      announce(`${form.elements.name.value} is started.`);
    } catch (error) {
      showError(form, error);
    }
  });
  $('#launch-panel').addEventListener('toggle', loadConfigs, { once: true });
}

async function loadConfigs() {
  try {
    const { data } = await get('/v1/configs');
    replace(form.elements.config, data.map(({ name, summary }) => h('option', { value: name, 'data-summary': summary }, name)));
    showSummary();
  } catch (error) {
    showError(form, error);
  }
}

async function runDry() {
  const number = (asked += 1);
  clearErrors(form);
  start.disabled = true;
  dryRun.disabled = true;
  report.hidden = false;
  report.textContent = 'The dry run is starting …';
  try {
    let launch = await post('/v1/launches', { ...body(), dry_run: true });
    while (launch.state === 'running' && number === asked) {
      report.textContent = launch.report || report.textContent;
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
      launch = await get(path('v1', 'launches', launch.id));
    }
    if (number !== asked) return;
    report.textContent = launch.report;
    start.disabled = launch.state !== 'done' || Boolean(launch.exit_code);
    announce(start.disabled ? 'The dry run failed: see its report.' : 'The dry run is done: the training can be started.');
  } catch (error) {
    report.hidden = true;
    showError(form, error);
  } finally {
    dryRun.disabled = false;
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
  return { config: config.value, name: name.value.trim(), ...(steps.value ? { steps: Number(steps.value) } : {}) };
}

function showSummary() {
  $('#config-hint').textContent = form.elements.config.selectedOptions[0]?.dataset.summary ?? '';
}
