/** The view of training runs: one or two of them are shown, and followed while the view is open. */

import { get, path, post } from './api.js';
import { Checkpoints } from './checkpoints.js';
import { Curves } from './curves.js';
import { confirmed } from './dialogs.js';
import { $, announce, button, h, replace } from './dom.js';
import { ago, count, duration, short } from './format.js';
import { followLaunch, startLaunches } from './launches.js';
import { Samples } from './samples.js';

const REFRESH_MS = 3000;
const MOST_SHOWN = 2;

const alert = $('#runs-error');
const rows = new Map();
let chosen = [];
let details = null;
let timer = null;
let refreshing = false;
let again = false;
let lost = false;

/** Let runs be started. */
export function startRuns() {
  startLaunches(async (name) => {
    await refresh();
    if (rows.has(name)) choose(name, true);
    return rows.has(name);
  });
}

/** Show the runs, and follow them. */
export function showRuns() {
  refresh();
  timer = setInterval(() => document.hidden || refresh(), REFRESH_MS);
}

/** Stop following the runs. */
export function hideRuns() {
  clearInterval(timer);
}

async function refresh() {
  again = refreshing;
  if (refreshing) return;
  refreshing = true;
  try {
    const { data } = await get('/v1/runs');
    showTable(data);
    await showDetails();
    if (lost) alert.textContent = '';
    lost = false;
  } catch (error) {
    alert.textContent = error.message;
    lost = true;
  } finally {
    refreshing = false;
  }
  if (again) refresh();
}

/** Show a row per run: new ones first, the others where they are, so that none moves from under a pointer. */
function showTable(runs) {
  const names = new Set(runs.map(({ name }) => name));
  const kept = new Map([...rows].filter(([name]) => names.has(name)));
  if (kept.size < Math.max(names.size, rows.size)) {
    rows.clear();
    for (const name of names) if (!kept.has(name)) rows.set(name, new Row(name));
    for (const [name, row] of kept) rows.set(name, row);
    const elements = [...rows.values()].map(({ element }) => element);
    replace($('#runs'), elements);
    chosen = chosen.filter((name) => rows.has(name));
    if (!chosen.length) chosen = [...rows.keys()].slice(0, 1);
  }
  for (const run of runs) rows.get(run.name).update(run);
  $('#runs-table').hidden = runs.length === 0;
  $('#no-runs').hidden = runs.length > 0;
}

function choose(name, shown) {
  chosen = chosen.filter((one) => one !== name);
  if (shown) chosen = [...chosen, name].slice(-MOST_SHOWN);
  for (const row of rows.values()) row.mark();
  refresh();
}

async function showDetails() {
  const names = chosen;
  if (names.join('\n') !== details?.names.join('\n')) {
    details?.release();
    details = names.length ? new Details(names) : null;
    replace($('#run-details'), details?.element);
  }
  await details?.update();
}

class Row {
  constructor(name) {
    this.name = name;
    this.box = h('input', {
      type: 'checkbox',
      'aria-label': `Show ${name}`,
      onchange: () => choose(name, this.box.checked),
    });
    this.state = h('span', { class: 'state' });
    this.progress = h('progress', { 'aria-label': `Steps of ${name}` });
    this.problem = h('p', { class: 'hint' });
    this.steps = h('span');
    this.loss = h('td', { class: 'number' });
    this.speed = h('td', { class: 'number' });
    this.left = h('td', { class: 'number' });
    this.updated = h('td');
    this.actions = h('td');
    this.element = h(
      'tr',
      { 'data-run': name },
      h('td', {}, h('label', { class: 'box' }, this.box)),
      h('th', { scope: 'row' }, name, this.problem),
      h('td', {}, this.state),
      h('td', { class: 'number' }, this.steps, this.progress),
      this.loss,
      this.speed,
      this.left,
      this.updated,
      this.actions,
    );
  }

  mark() {
    this.box.checked = chosen.includes(this.name);
    this.element.classList.toggle('chosen', this.box.checked);
  }

  update(run) {
    this.mark();
    this.problem.textContent = run.problem ?? '';
    this.steps.textContent = run.steps ? `${count(run.step)} of ${count(run.steps)}` : count(run.step ?? 0);
    this.done = run.step ?? 0;
    this.progress.max = run.steps || 1;
    this.progress.value = run.steps ? run.step : 0;
    this.loss.textContent = short(run.loss);
    this.speed.textContent = short(run.clips_per_second);
    this.left.textContent = run.state === 'running' ? duration(run.eta_seconds) : '–';
    this.updated.textContent = ago(run.updated);
    if (this.state.dataset.state === run.state) return;
    this.state.dataset.state = run.state;
    this.state.textContent = run.state;
    this.state.title = run.host ?? '';
    replace(this.actions, this.action(run.state));
  }

  action(state) {
    if (state === 'running') return button('Stop', () => this.stop(), { 'aria-label': `Stop ${this.name}` });
    if (state === 'stopped')
      return button('Resume', () => this.resume(), { 'aria-label': `Resume ${this.name}` });
    if (state === 'finished')
      return button('Continue', () => this.continue(), { 'aria-label': `Continue ${this.name}` });
    return null;
  }

  async stop() {
    const question = `Stop ${this.name}?`;
    const explanation = 'The run writes a checkpoint and ends. It resumes bit for bit from there.';
    if (await confirmed(question, explanation, 'Stop')) this.request('stop', 'is asked to stop');
  }

  async resume() {
    const explanation = 'The training starts as a process of its own, from the newest whole checkpoint.';
    if (await confirmed(`Resume ${this.name}?`, explanation, 'Resume')) this.request('resume', 'is resumed');
  }

  async continue() {
    const steps = h('input', { id: 'steps-in-all', type: 'number', min: this.done + 1, value: 2 * this.done });
    const field = h('div', { class: 'field' }, h('label', { for: steps.id }, 'Steps in all'), steps);
    const explanation = `The run has done ${count(this.done)} steps. It resumes from there.`;
    if (await confirmed(`Continue ${this.name}?`, explanation, 'Continue', field))
      this.request('resume', 'is continued', { steps: Number(steps.value) });
  }

  async followResume(launch) {
    const ended = await followLaunch(launch, () => this.state.dataset.state === 'running');
    if (ended.state !== 'failed') return;
    alert.textContent = `${this.name} was not resumed: ${ended.report.trim().split('\n').at(-1)}`;
  }

  async request(action, done, body = undefined) {
    try {
      alert.textContent = '';
      const answer = await post(path('v1', 'runs', this.name, action), body);
      announce(`${this.name} ${done}.`);
      await refresh();
      if (action === 'resume') await this.followResume(answer);
    } catch (error) {
      alert.textContent = error.message;
    }
  }
}

/** Curves, validation videos and checkpoints of one or two runs. */
class Details {
  constructor(names) {
    this.names = names;
    this.curves = new Curves();
    this.samples = new Samples();
    this.checkpoints = new Checkpoints();
    this.seen = null;
    const legend = names.map((name, index) => h('li', { class: `legend run-${index}` }, name));
    this.element = h(
      'div',
      {},
      h('h3', {}, names.length > 1 ? `${names[0]} and ${names[1]}` : names[0]),
      names.length > 1 ? h('ul', { class: 'legends' }, legend) : null,
      this.curves.element,
      this.samples.element,
      this.checkpoints.element,
    );
  }

  async update() {
    const runs = await Promise.all(this.names.map((name) => get(path('v1', 'runs', name))));
    const seen = JSON.stringify(runs.map(({ step, updated }) => [step, updated]));
    this.checkpoints.update(runs);
    if (seen === this.seen) return;
    const [complete] = await Promise.all([this.curves.update(runs), this.samples.update(runs)]);
    this.seen = complete ? seen : null;
  }

  release() {
    this.curves.release();
    this.samples.release();
  }
}
