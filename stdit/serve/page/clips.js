/** Videos that loop while they can be seen, and are unloaded when they cannot. */

import { $$, button, h, reducedMotion } from './dom.js';

const watcher = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) start(target);
      else stop(target);
    }
  },
  { rootMargin: '100px' },
);

let paused = reducedMotion();

/** Return a looping muted video that plays while it is on the screen. */
export function loopingVideo(address, label, attributes = {}) {
  const video = h('video', {
    muted: true,
    loop: true,
    playsInline: true,
    preload: 'none',
    'aria-label': label,
    ...attributes,
  });
  video.dataset.address = address;
  watcher.observe(video);
  return video;
}

/** Return a button that pauses and plays the videos without controls of their own, all over the page. */
export function pauseButton() {
  const toggle = button('', () => {
    paused = !paused;
    dispatchEvent(new Event('videos-paused'));
  });
  const tell = () => (toggle.textContent = paused ? 'Play videos' : 'Pause videos');
  addEventListener('videos-paused', tell);
  tell();
  return toggle;
}

addEventListener('videos-paused', () => {
  for (const video of $$('video:not([controls])')) paused ? video.pause() : video.src && play(video);
});

/** Unload the videos and pictures of an element that is about to be removed: Chromium keeps those that are loaded. */
export function releaseMedia(within) {
  for (const video of within.querySelectorAll('video')) {
    watcher.unobserve(video);
    stop(video);
  }
  for (const image of within.querySelectorAll('img')) image.removeAttribute('src');
}

function start(video) {
  if (!video.src) {
    video.preload = 'metadata';
    video.src = video.dataset.address;
  }
  if (video.controls ? !reducedMotion() : !paused) play(video);
}

function stop(video) {
  video.pause();
  if (!video.src) return;
  video.removeAttribute('src');
  video.load();
}

const play = (video) => video.play().catch(() => {});
