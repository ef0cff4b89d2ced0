/** What a submission will take, told while its form is filled in. */

import { post } from './api.js';
import { $, debounce, h, replace } from './dom.js';
import { clearErrors, showError } from './errors.js';
import { bytes, duration, plural } from './format.js';
import { learnOverlap, readLayout, readPrompts, readSettings } from './settings.js';
import { drawTimeline } from './timeline.js';

const WAIT_MS = 300;

const form = $('#make-form');
const line = $('#estimate');
const warnings = $('#estimate-warnings');
let running = new AbortController();

/** Estimate the form's submission 300 ms after the last change. */
export const estimateSoon = debounce(estimate, WAIT_MS);

/** Drop an estimate that is under way, so that it does not clear the errors of a submission. */
export function cancelEstimate() {
  estimateSoon.cancel();
  running.abort();
}

async function estimate() {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  const prompts = readPrompts();
  const asked = { ...readSettings(), prompt: prompts[0] ?? 'a video' };
  try {
    const found = await post('/v1/estimate', asked, { signal, retries: 0 });
    clearErrors(form);
    if (found.overlap && !('overlap' in asked)) {
      learnOverlap(found);
      drawTimeline(readLayout());
    }
    line.dataset.fits = found.fits;
    line.textContent = told(found, Math.max(1, prompts.length));
    replace(
      warnings,
      (found.warnings ?? []).map((warning) => h('li', {}, warning)),
    );
  } catch (error) {
    if (signal.aborted) return;
    clearErrors(form);
    line.textContent = '';
    warnings.replaceChildren();
    showError(form, error, { focus: false });
  }
}

function told(
  { seconds, memory_bytes, memory_free_bytes, fits, model_calls, num_frames, height, width },
  videos,
) {
  const parts = [
    `${width} × ${height}, ${plural(num_frames, 'frame')}`,
    plural(model_calls, 'model call'),
    seconds === null
      ? 'time not known yet'
      : `about ${duration(seconds)}${videos > 1 ? ` a video, ${duration(seconds * videos)} for ${videos}` : ''}`,
    fits
      ? `${bytes(memory_bytes)} of memory`
      : `needs ${bytes(memory_bytes)} of memory, and ${bytes(memory_free_bytes)} are free`,
  ];
  return parts.join(' · ');
}
