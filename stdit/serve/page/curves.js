/** Curves of one or two runs: loss, learning rate, throughput, waiting for data, memory. */

import { get, path } from './api.js';
import { h, replace } from './dom.js';
import { Plot } from './plot.js';

const POINTS = 400;
const PLOTS = [
  ['loss', 'Loss'],
  ['validation_loss', 'Validation loss'],
  ['lr', 'Learning rate'],
  ['clips_per_second', 'Clips per second'],
  ['data_share', 'Share of the time spent waiting for data'],
  ['data_seconds', 'Seconds of waiting for data'],
  ['grad_norm', 'Gradient norm'],
];
const MEMORY = /memory|gib|bytes/;

/** The plots of the runs that are shown. */
export class Curves {
  constructor() {
    this.element = h('div', { class: 'plots' });
    this.plots = new Map();
  }

  /** Read the metrics of runs, [{name, fields}], and draw them; returns whether all of them were read. */
  async update(runs) {
    const wanted = PLOTS.filter(([field]) => runs.some(({ fields }) => fields.includes(field)));
    const memory = [...new Set(runs.flatMap(({ fields }) => fields.filter((field) => MEMORY.test(field))))];
    const titles = new Map([...wanted, ...memory.map((field) => [field, titleOf(field)])]);
    this.show(titles);
    const metrics = await Promise.all(
      runs.map(({ name, fields }) =>
        metricsOf(
          name,
          fields.filter((field) => titles.has(field)),
        ),
      ),
    );
    for (const [field, plot] of this.plots) {
      plot.update(
        runs.map(({ name }, index) => ({
          name,
          points: (metrics[index].fields[field] ?? []).filter(isWhole),
        })),
      );
    }
    return metrics.every(({ complete }) => complete !== false);
  }

  release() {
    for (const plot of this.plots.values()) plot.release();
  }

  show(titles) {
    if ([...titles.keys()].join() === [...this.plots.keys()].join()) return;
    this.release();
    this.plots = new Map([...titles].map(([field, title]) => [field, new Plot(title)]));
    replace(
      this.element,
      [...this.plots.values()].map((plot) => plot.element),
    );
  }
}

async function metricsOf(name, fields) {
  if (!fields.length) return { fields: {} };
  const query = new URLSearchParams({ fields: fields.join(','), points: POINTS, after: -1 });
  return get(`${path('v1', 'runs', name, 'metrics')}?${query}`);
}

const titleOf = (field) => field[0].toUpperCase() + field.slice(1).replaceAll('_', ' ');

const isWhole = (point) => point.every((value) => Number.isFinite(value));
