/** What can be done with a finished video, on its card and in the gallery. */

import { $, announce } from './dom.js';
import { addCondition } from './conditions.js';
import { plural } from './format.js';
import { submit } from './jobs.js';
import { loadModels, modelOf } from './models.js';
import { drawSeed } from './seed.js';
import { fillSettings } from './settings.js';

/** Fill the form with the settings of a video, and show it. */
export async function useSettings(settings) {
  if (!modelOf(settings.model)) await loadModels();
  fillSettings(settings);
  showForm();
  announce('The form has the settings of the video.');
}

/** Submit the settings of a video with another seed. */
export const sameAgain = ({ settings }) => submit({ ...settings, seed: drawSeed() });

/** Submit a video that begins with the last quarter of another one; returns what it does as text. */
export async function extend(video) {
  const { conditions, segments, segment_prompts, overlap, loop, ...settings } = video.settings;
  const length = extensionLength(video);
  const condition = { video: video.id, frame: 0, source_frame: -length, length };
  await submit({ ...settings, seed: drawSeed(), conditions: [condition] });
  return `Submitted: ${extensionText(video)}`;
}

/** Return what an extension is. */
export const extensionText = (video) =>
  `a new video that begins with the last ${plural(extensionLength(video), 'frame')} of this one.`;

const extensionLength = ({ num_frames, settings }) =>
  Math.max(1, Math.floor((settings.num_frames ?? num_frames) / 4));

/** Add the last frame of a video to the conditioning frames of the form. */
export function useLastFrame({ id, prompt }) {
  addCondition(
    { video: id, source_frame: -1, frame: 0, length: 1 },
    { name: `Last frame of “${prompt}”`, kind: 'image' },
  );
  showForm();
  announce('The form has the last frame as its first conditioning frame.');
}

/** Whether the model of a video takes conditioning frames. */
export const canCondition = ({ model }) => modelOf(model)?.conditioning ?? false;

/** Show the form, with the focus on the prompt. */
export function showForm() {
  location.hash = '#make';
  requestAnimationFrame(() => $('#prompt').focus());
}
