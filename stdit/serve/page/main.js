/** Start the page: its views, and the state of the workers. */

import { get } from './api.js';
import { $, $$ } from './dom.js';
import { events, openEvents } from './events.js';
import { plural } from './format.js';
import { showGallery, startGallery } from './gallery.js';
import { refreshModels, startMake } from './make.js';
import { hideRuns, showRuns, startRuns } from './runs.js';

const VIEWS = {
  make: { title: 'Make', show: refreshModels, hide: () => {} },
  gallery: { title: 'Gallery', show: showGallery, hide: () => {} },
  runs: { title: 'Runs', show: showRuns, hide: hideRuns },
};

let current = null;

function showView() {
  const asked = location.hash.slice(1);
  const name = asked in VIEWS ? asked : (current ?? 'make');
  if (name === current) return;
  if (current) VIEWS[current].hide();
  current = name;
  for (const view of Object.keys(VIEWS)) $(`#view-${view}`).hidden = view !== name;
  for (const link of $$('nav[aria-label=Views] a')) {
    if (link.hash === `#${name}`) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  document.title = `${VIEWS[name].title} · stdit`;
  scrollTo(0, 0);
  VIEWS[name].show();
}

function showWorkers({ status, workers, queued, running }) {
  const alive = workers.filter(({ state }) => state !== 'dead');
  const busy = workers.filter(({ state }) => state === 'busy').length;
  const starting = alive.length > 0 && alive.every(({ state }) => state === 'starting');
  const parts = [
    workersText(alive.length, busy, starting),
    running > busy ? `${running} running` : '',
    queued ? `${queued} queued` : '',
    alive.length < workers.length ? `${workers.length - alive.length} restarting` : '',
  ];
  const element = $('#workers');
  element.textContent = parts.filter(Boolean).join(' · ');
  element.dataset.state = status;
  element.title = workers
    .map(({ name, state, model, device }) => `${name}: ${state}, ${model ?? 'no model'}, ${device}`)
    .join('\n');
}

function workersText(alive, busy, starting) {
  if (starting) return 'Loading the model';
  if (!busy) return `${plural(alive, 'worker')} ready`;
  return busy < alive ? `${busy} of ${plural(alive, 'worker')} busy` : `${plural(alive, 'worker')} busy`;
}

function showLost() {
  $('#workers').textContent = 'No connection to the server, trying again';
  $('#workers').dataset.state = 'lost';
}

addEventListener('login-required', () => ($('#login').hidden = false));
$('#reload').addEventListener('click', () => location.reload());
events.addEventListener('workers', ({ detail }) => showWorkers(detail));
events.addEventListener('disconnected', showLost);
events.addEventListener('connected', () => get('/health').then(showWorkers, showLost));

startMake();
startGallery();
startRuns();
openEvents();
addEventListener('hashchange', showView);
showView();
