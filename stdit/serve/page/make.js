/** The view to make videos. */

import { startCards } from './cards.js';
import { startConditions } from './conditions.js';
import { $, announce } from './dom.js';
import { clearError, clearErrors, showError } from './errors.js';
import { cancelEstimate, estimateSoon } from './estimate.js';
import { events } from './events.js';
import { duration, plural } from './format.js';
import { startGrid } from './grid.js';
import { startJobs, submit } from './jobs.js';
import { startLoras } from './loras.js';
import { loadModels } from './models.js';
import { nextSeed, startSeed } from './seed.js';
import {
  chosenModel,
  fillSettings,
  readLayout,
  readPrompts,
  readSettings,
  resetToModel,
  showAllowedSizes,
  showDependent,
} from './settings.js';
import { drawTimeline } from './timeline.js';

const form = $('#make-form');
const WIDE = matchMedia('(min-width: 60rem)'); // the results stand beside the form
const submitButton = $('#make-button');

/** Load the models, and let the form estimate and submit. */
export async function startMake() {
  startSeed();
  startConditions();
  startCards();
  startGrid();
  startJobs();
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    make();
  });
  form.addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    make();
  });
  for (const name of ['input', 'change', 'filled']) form.addEventListener(name, changed);
  $('#model').addEventListener('change', resetToModel);
  $('#any_size').addEventListener('change', showAllowedSizes);
  events.addEventListener('connected', () => chosenModel() && estimateSoon()); // errors of the outage are over
  try {
    const [model] = await Promise.all([loadModels(), startLoras()]);
    if (model) fillSettings({ model });
    else
      showError(form, {
        message: 'No model is offered: start the server with a checkpoint.',
        param: 'model',
      });
  } catch (error) {
    showError(form, error);
  }
}

/** Load the models again, such as of a run that has a new checkpoint. */
export const refreshModels = () => $('#model').options.length && loadModels().catch(() => {});

function changed(event) {
  if (event.type === 'input') clearError(event.target);
  showDependent();
  const layout = readLayout();
  drawTimeline(layout);
  const prompts = readPrompts().length;
  $('#prompt-count').textContent = prompts > 1 ? `${plural(prompts, 'video')}.` : '';
  $('#length-hint').textContent =
    `${duration(layout.num_frames / layout.fps)} at ${layout.fps} frames per second.`;
  estimateSoon();
}

async function make() {
  if (submitButton.disabled) return;
  cancelEstimate();
  clearErrors(form);
  const written = readPrompts();
  const prompts = written.length ? written : ['']; // which the server refuses in its own words
  submitButton.disabled = true;
  const seed = nextSeed();
  const body = { ...readSettings(), seed };
  let accepted = 0;
  try {
    for (const prompt of prompts) {
      await submit({ ...body, prompt });
      accepted += 1;
    }
    if (!WIDE.matches) $('#videos').scrollIntoView({ block: 'start' });
    if (accepted > 1) announce(`${plural(accepted, 'video')} are queued.`);
  } catch (error) {
    showError(form, error);
    if (accepted) {
      form.elements.prompt.value = prompts.slice(accepted).join('\n'); // mended, they are not made twice
      $('#make-error').textContent =
        `${accepted} of ${plural(prompts.length, 'video')} are queued; the next one was refused: ${error.message}`;
    }
  } finally {
    submitButton.disabled = false;
  }
}
