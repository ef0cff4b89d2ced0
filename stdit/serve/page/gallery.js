/** The gallery: all videos of the folder, one page of them at a time. */

import { get, path, postFile } from './api.js';
import { releaseMedia } from './clips.js';
import { acceptDrops } from './conditions.js';
import { $, $$, announce, button, debounce, h, reducedMotion, replace } from './dom.js';
import { clearError, showFileError } from './errors.js';
import { plural, short } from './format.js';
import { inspectionOf } from './inspection.js';
import { jobs } from './jobs.js';
import { playVideo, startPlayer } from './player.js';

const PAGE = 48;
const HOVER_MS = 150;
const INDEXING_MS = 2000;

const view = $('#view-gallery');
const list = $('#gallery-items');
const search = $('#search');
const checkpoint = $('#checkpoint');
const chooser = $('#inspect-file');

let cursor = null;
let next = null;
let asked = 0;

/** Let the gallery be searched, and files be dropped anywhere to be inspected in it. */
export function startGallery() {
  startPlayer();
  $('#gallery-form').addEventListener('submit', (event) => event.preventDefault());
  search.addEventListener(
    'input',
    debounce(() => showPage(null), 300),
  );
  checkpoint.addEventListener('change', () => showPage(null));
  $('#newest').addEventListener('click', () => showPage(null));
  $('#older').addEventListener('click', () => showPage(next));
  chooser.addEventListener('change', () => {
    inspect([...chooser.files]);
    chooser.value = '';
  });
  acceptDrops(document.documentElement, inspectDropped);
  const refresh = debounce(() => view.hidden || cursor || showPage(null), 500);
  jobs.addEventListener('video', ({ detail }) => detail.status === 'completed' && refresh());
}

/** Show the newest videos. */
export const showGallery = () => showPage(cursor);

async function showPage(before) {
  const number = (asked += 1);
  const query = new URLSearchParams({ limit: PAGE });
  if (before) query.set('before', before);
  if (search.value.trim()) query.set('search', search.value.trim());
  if (checkpoint.value) query.set('checkpoint', checkpoint.value);
  $('#gallery-error').textContent = '';
  let page;
  try {
    page = await get(`/v1/gallery?${query}`);
  } catch (error) {
    $('#gallery-error').textContent = error.message;
    return;
  }
  if (number !== asked) return;
  cursor = before;
  next = page.next;
  releaseMedia(list);
  replace(list, page.data.map(thumbnail));
  showCheckpoints(page.checkpoints);
  $('#gallery-count').textContent =
    `${plural(page.total, 'video')}${page.indexing ? '; the folder is still being read' : ''}.`;
  $('#newest').disabled = !before;
  $('#older').disabled = !next;
  if (before) view.scrollIntoView();
  if (page.indexing) setTimeout(() => number === asked && !view.hidden && showPage(before), INDEXING_MS);
}

function thumbnail(item) {
  const address = path('v1', 'gallery', item.id);
  const image = h('img', {
    src: `${address}/thumbnail`,
    alt: '',
    loading: 'lazy',
    decoding: 'async',
    width: item.width,
    height: item.height,
  });
  const open = () => playVideo(item, () => showPage(cursor));
  const opener = h(
    'button',
    { type: 'button', class: 'thumbnail', onclick: open, 'data-gallery-id': item.id },
    image,
    h('span', { class: 'prompt' }, item.prompt || item.name),
    h('span', { class: 'hint' }, factsOf(item)),
  );
  playWhilePointed(opener, image, `${address}/content`);
  return h('li', {}, opener);
}

function factsOf({ seed, width, height, seconds }) {
  const facts = [
    seed === null ? '' : `seed ${seed}`,
    width ? `${width} × ${height}` : '',
    seconds ? `${short(seconds)} s` : '',
  ];
  return facts.filter(Boolean).join(' · ');
}

/** Put the video in the place of its thumbnail while the pointer or the focus is on it. */
function playWhilePointed(opener, image, address) {
  let timer;
  let video;
  const play = () => {
    if (reducedMotion() || video) return;
    video = h('video', {
      src: address,
      muted: true,
      loop: true,
      playsInline: true,
      width: image.width,
      height: image.height,
      'aria-hidden': 'true',
    });
    video.addEventListener('playing', () => video && image.replaceWith(video), { once: true });
    video.play().catch(() => {});
  };
  const stop = () => {
    clearTimeout(timer);
    if (!video) return;
    video.replaceWith(image);
    video.removeAttribute('src');
    video.load();
    video = null;
  };
  const soon = () => {
    clearTimeout(timer);
    timer = setTimeout(play, HOVER_MS);
  };
  for (const name of ['pointerenter', 'focus']) opener.addEventListener(name, soon);
  for (const name of ['pointerleave', 'blur', 'click']) opener.addEventListener(name, stop);
}

function showCheckpoints(names) {
  const shown = [...checkpoint.options].slice(1).map((option) => option.value);
  if (shown.join('\n') === names.join('\n')) return;
  const chosen = checkpoint.value;
  replace(
    checkpoint,
    h('option', { value: '' }, 'all'),
    names.map((name) => h('option', { value: name }, name)),
  );
  checkpoint.value = names.includes(chosen) ? chosen : '';
}

function inspectDropped(files) {
  for (const dialog of $$('dialog[open]')) dialog.close();
  location.hash = '#gallery';
  return inspect(files);
}

async function inspect([file]) {
  if (!file) return;
  clearError(chooser);
  const panel = $('#inspection');
  panel.hidden = true;
  try {
    const found = await postFile('/v1/inspect', file);
    const close = button('Close', () => {
      panel.hidden = true;
      chooser.focus();
    });
    replace(panel, h('header', {}, h('h3', {}, `Settings of ${file.name}`), close), inspectionOf(found));
    panel.hidden = false;
    panel.scrollIntoView({ block: 'nearest' });
    announce(`The settings of ${file.name} are shown.`);
  } catch (error) {
    showFileError(chooser, file, error);
  }
}
