/** The seed: a new one for each submission, or locked. */

import { $ } from './dom.js';

const LARGEST_DRAWN = 2 ** 32;

const input = $('#seed');
const lock = $('#lock-seed');

/** Return the seed of the form: a number, text of digits that a number would round, or null. */
export function readSeed() {
  const text = input.value.trim();
  if (!text) return null;
  return Number.isSafeInteger(Number(text)) ? Number(text) : text;
}

/** Return a new random seed. */
export const drawSeed = () => crypto.getRandomValues(new Uint32Array(1))[0] % LARGEST_DRAWN;

/** Show the seed of a submission and lock it; without one, unlock. */
export function fillSeed(seed) {
  input.value = seed ?? '';
  setLock(seed !== undefined && seed !== null);
}

/** Return the seed of the next submission, which is shown: a new one if it is not locked. */
export function nextSeed() {
  if (!isLocked() || readSeed() === null) input.value = drawSeed();
  return readSeed();
}

/** Let the buttons draw and lock; a seed that is typed is locked. */
export function startSeed() {
  $('#draw-seed').addEventListener('click', () => {
    input.value = drawSeed();
    setLock(true);
  });
  lock.addEventListener('click', () => setLock(!isLocked()));
  input.addEventListener('input', () => setLock(input.value.trim() !== ''));
  setLock(false);
}

/** Whether the same seed is used for each submission. */
export const isLocked = () => lock.getAttribute('aria-pressed') === 'true';

function setLock(locked) {
  lock.setAttribute('aria-pressed', String(locked));
  $('#seed-hint').textContent = locked
    ? 'Locked: the same seed for each submission.'
    : 'Not locked: a new one is drawn for each submission.';
}
