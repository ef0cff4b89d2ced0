/** Validation videos of runs: a row per prompt and run, a column per step. */

import { get, path } from './api.js';
import { loopingVideo, pauseButton, releaseMedia } from './clips.js';
import { h, replace } from './dom.js';
import { count } from './format.js';

const SHOWN_STEPS = 8;
const PAUSE = pauseButton();

/** The table of validation videos of the runs that are shown. */
export class Samples {
  constructor() {
    this.table = h('div', {
      class: 'scroll',
      tabindex: 0,
      role: 'region',
      'aria-label': 'Validation videos by step',
    });
    this.element = h('section', { hidden: true }, h('h3', {}, 'Validation videos'), PAUSE, this.table);
    this.shown = '';
  }

  /** Read which videos the runs, [{name}], have, and show them if they changed. */
  async update(runs) {
    const found = await Promise.all(runs.map(({ name }) => get(path('v1', 'runs', name, 'samples'))));
    const shown = JSON.stringify([runs.map(({ name }) => name), found.map(({ steps }) => steps)]);
    if (shown === this.shown) return;
    this.shown = shown;
    const samples = found.flatMap(({ data }, index) => data.map((one) => ({ ...one, run: index })));
    this.element.hidden = samples.length === 0;
    releaseMedia(this.table);
    replace(this.table, tableOf(runs, samples));
  }

  release() {
    releaseMedia(this.table);
  }
}

function tableOf(runs, samples) {
  const steps = [...new Set(samples.map(({ step }) => step))].sort((a, b) => a - b);
  const rows = new Map();
  for (const one of samples) {
    const prompt = one.prompt ?? `${one.name} (damaged)`;
    const label = one.num_inference_steps ? `${prompt} (${one.num_inference_steps} steps)` : prompt;
    const row = rows.get(label) ?? new Map();
    rows.set(label, row.set(`${one.run} ${one.step}`, one));
  }
  const kept = spread(steps);
  const head = h(
    'tr',
    {},
    h('th', { scope: 'col' }, 'Prompt'),
    kept.map((step) => h('th', { scope: 'col' }, `step ${count(step)}`)),
  );
  const body = [...rows].flatMap(([label, videos]) =>
    runs.map(({ name }, index) =>
      h(
        'tr',
        {},
        h(
          'th',
          { scope: 'row' },
          label,
          runs.length > 1 ? h('span', { class: `legend run-${index}` }, name) : null,
        ),
        kept.map((step) => cellOf(videos.get(`${index} ${step}`), label)),
      ),
    ),
  );
  return h('table', { class: 'samples' }, h('thead', {}, head), h('tbody', {}, body));
}

function cellOf(sample, label) {
  if (!sample) return h('td', {});
  return h('td', {}, loopingVideo(sample.url, `${label}, step ${sample.step}`, { width: 96, height: 96 }));
}

/** Return at most eight of the steps, evenly spread, with the first and the last. */
function spread(steps) {
  if (steps.length <= SHOWN_STEPS) return steps;
  return Array.from(
    { length: SHOWN_STEPS },
    (_, index) => steps[Math.round((index * (steps.length - 1)) / (SHOWN_STEPS - 1))],
  );
}
