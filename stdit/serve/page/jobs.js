/** The videos that the server makes or made lately, kept up to date by its events. */

import { get, path, post, remove } from './api.js';
import { announce } from './dom.js';
import { events } from './events.js';

const SHOWN = 40;
const ENDED = ['completed', 'failed', 'cancelled'];

/** Dispatches `video` (detail: Video), `preview` (detail: {id, image}) and `deleted` (detail: id). */
export const jobs = new EventTarget();

const videos = new Map();

/** Return what is known of a video, or undefined. */
export const videoOf = (id) => videos.get(id);

/** Whether nothing more will happen to a video. */
export const hasEnded = (video) => ENDED.includes(video.status);

/** Follow the server's events, and load recent videos whenever the stream begins again. */
export function startJobs() {
  events.addEventListener('video', ({ detail }) => update(detail));
  events.addEventListener('preview', ({ detail }) => dispatch('preview', detail));
  events.addEventListener('deleted', ({ detail }) => forget(detail.id));
  events.addEventListener('connected', loadRecent);
}

/** Submit a video; returns it as it was accepted. */
export async function submit(body) {
  const video = await post('/v1/videos', body);
  if (!videos.has(video.id)) update(video);
  announce(video.position ? `Queued, ${video.position} before it.` : 'Queued.');
  return video;
}

/** Cancel a video that waits or is being made. */
export const cancel = async (id) => update(await post(path('v1', 'videos', id, 'cancel')));

/** Delete a video and its files. */
export async function deleteVideo(id) {
  await remove(path('v1', 'videos', id));
  forget(id);
}

/** Return a video, asked of the server if it is not known. */
export async function findVideo(id) {
  return videos.get(id) ?? (await get(path('v1', 'videos', id)));
}

/** Load the newest videos; others that are shown may have changed or been deleted while there was no stream. */
async function loadRecent() {
  const { data } = await get(`/v1/videos?limit=${SHOWN}&order=desc`).catch(() => ({ data: [] }));
  const found = new Set(data.map(({ id }) => id));
  const missed = [...videos.values()].filter((video) => !found.has(video.id));
  for (const video of data.reverse()) update(video);
  for (const { id } of missed) {
    await get(path('v1', 'videos', id)).then(update, ({ status }) => status === 404 && forget(id));
  }
}

function update(video) {
  const before = videos.get(video.id);
  if (before && hasEnded(before) && !hasEnded(video)) return; // an answer that an event has overtaken
  videos.set(video.id, video);
  if (before && before.status !== video.status && hasEnded(video)) announce(ending(video));
  dispatch('video', video);
  const ended = [...videos.values()].filter(hasEnded);
  if (ended.length > SHOWN) forget(oldest(ended).id);
}

function forget(id) {
  if (!videos.delete(id)) return;
  dispatch('deleted', id);
}

function ending({ status, prompt, error }) {
  if (status === 'completed') return `Finished: ${prompt}`;
  return status === 'failed' ? `Failed: ${error?.message ?? prompt}` : `Cancelled: ${prompt}`;
}

const oldest = (list) => list.reduce((one, other) => (other.created_at < one.created_at ? other : one));

const dispatch = (name, detail) => jobs.dispatchEvent(new CustomEvent(name, { detail }));
