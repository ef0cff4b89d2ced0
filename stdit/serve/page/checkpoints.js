/** The checkpoints of runs, with their sizes and states. */

import { showForm } from './actions.js';
import { announce, button, h, replace } from './dom.js';
import { bytes, count } from './format.js';
import { loadModels, modelOf } from './models.js';
import { fillSettings } from './settings.js';

/** The table of checkpoints of the runs that are shown. */
export class Checkpoints {
  constructor() {
    this.body = h('tbody');
    const columns = ['Run', 'Step', 'Size', 'State', 'Actions'].map((name) =>
      h('th', { scope: 'col' }, name),
    );
    const table = h('table', {}, h('thead', {}, h('tr', {}, columns)), this.body);
    this.scroll = h(
      'div',
      { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': 'Table of checkpoints' },
      table,
    );
    this.empty = h('p', { class: 'empty' }, 'No checkpoint is written yet.');
    this.element = h('section', {}, h('h3', {}, 'Checkpoints'), this.empty, this.scroll);
    this.shown = '';
  }

  /** Show the checkpoints of runs, [{name, checkpoints}]. */
  update(runs) {
    const shown = JSON.stringify(runs.map(({ name, checkpoints }) => [name, checkpoints]));
    if (shown === this.shown) return;
    this.shown = shown;
    const rows = runs.flatMap(({ name, checkpoints }) =>
      [...checkpoints]
        .sort((one, other) => other.step - one.step)
        .map((checkpoint) => rowOf(name, checkpoint)),
    );
    this.empty.hidden = rows.length > 0;
    this.scroll.hidden = rows.length === 0;
    replace(this.body, rows);
  }
}

function rowOf(run, { step, bytes: size, state, reason, verified, model }) {
  const broken = state === 'broken';
  const note = h('span', { class: 'error', role: 'status' });
  const sample = button(
    'Sample from this step',
    async () => {
      try {
        await loadModels();
      } catch (error) {
        note.textContent = error.message;
        return;
      }
      if (!modelOf(model)) {
        note.textContent = `${model} is not offered.`;
        return;
      }
      fillSettings({ model });
      showForm();
      announce(`The form samples from ${model}.`);
    },
    { disabled: broken, 'aria-label': `Sample from step ${step} of ${run}` },
  );
  return h(
    'tr',
    {},
    h('td', {}, run),
    h('td', { class: 'number' }, count(step)),
    h('td', { class: 'number' }, bytes(size)),
    h(
      'td',
      {},
      h('span', { class: 'state', 'data-state': state }, state),
      h('p', { class: 'hint' }, broken ? reason : verified === false ? 'hashes not checked yet' : ''),
    ),
    h('td', {}, sample, note),
  );
}
