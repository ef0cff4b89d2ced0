/** One stream of events for the whole page; it reconnects by itself. */

import { get } from './api.js';

const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 15000;

/** Dispatches `video`, `preview`, `deleted` and `workers` with the data as `detail`; `connected`, `disconnected`. */
export const events = new EventTarget();

let wait = FIRST_WAIT_MS;

let source = null;

/** Open the stream of events; that of a hidden page is closed, since a browser allows few streams to one server. */
export function openEvents() {
  document.addEventListener('visibilitychange', () => (document.hidden ? close() : open()));
  open();
}

function open() {
  if (source || document.hidden) return;
  source = new EventSource('/v1/events');
  for (const name of ['video', 'preview', 'deleted', 'workers']) {
    source.addEventListener(name, (event) => dispatch(name, JSON.parse(event.data)));
  }
  source.onopen = () => {
    wait = FIRST_WAIT_MS;
    dispatch('connected');
  };
  source.onerror = () => {
    dispatch('disconnected');
    if (source?.readyState !== EventSource.CLOSED) return;
    source = null;
    retry();
  };
}

function close() {
  source?.close();
  source = null;
}

/** A browser gives up on a stream that is answered by an error; ask for the reason, and try again later. */
async function retry() {
  await get('/health').catch(() => null);
  setTimeout(open, wait);
  wait = Math.min(LONGEST_WAIT_MS, wait * 2);
}

const dispatch = (name, detail) => events.dispatchEvent(new CustomEvent(name, { detail }));
