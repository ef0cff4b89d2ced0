/** The settings that are recorded in a video, and making the same video again. */

import { useSettings } from './actions.js';
import { button, definitions, h } from './dom.js';
import { submit } from './jobs.js';

/** Return the settings of a video as the server found them in its file, with what can be done with them. */
export function inspectionOf({ settings, metadata, missing, reproducible, reason }, before = () => {}) {
  const note = h(
    'p',
    { class: 'hint', role: 'status' },
    reproducible ? 'Reproduce makes the same pixels again.' : (reason ?? missing),
  );
  const showProblem = (error) => {
    note.textContent = error.message;
    note.className = 'error';
  };
  const reproduce = button(
    'Reproduce',
    async () => {
      reproduce.disabled = true;
      try {
        await submit(settings);
        before();
        location.hash = '#make';
      } catch (error) {
        showProblem(error);
      }
      reproduce.disabled = !reproducible;
    },
    { disabled: !reproducible },
  );
  const use = button('Use these settings', () => {
    before();
    useSettings(settings).catch(showProblem);
  });
  return h(
    'div',
    { class: 'inspection' },
    definitions(Object.entries(settings).map(([name, value]) => [name, textOf(value)])),
    h(
      'details',
      {},
      h('summary', {}, 'Everything that the file records'),
      h('pre', { tabindex: 0 }, JSON.stringify(metadata, null, 2)),
    ),
    missing && reason !== missing ? h('p', { class: 'error' }, missing) : null,
    note,
    h('div', { class: 'buttons' }, use, reproduce),
  );
}

function textOf(value) {
  if (value === null || value === undefined || (Array.isArray(value) && !value.length)) return '';
  return typeof value === 'object' ? JSON.stringify(value) : String(value);
}
