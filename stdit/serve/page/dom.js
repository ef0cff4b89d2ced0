/** Elements from data: text is always set as text, never parsed as HTML. */

const PROPERTIES = new Set([
  'value',
  'checked',
  'disabled',
  'hidden',
  'muted',
  'loop',
  'playsInline',
  'selected',
]);

/** Return the first element that matches a selector. */
export const $ = (selector, within = document) => within.querySelector(selector);

/** Return all elements that match a selector, as an array. */
export const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

/** Return a new element; names that begin with "on" are event listeners, null and false are left out. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (PROPERTIES.has(name)) element[name] = value;
    else if (value !== false) element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...present(children));
  return element;
}

/** Return a button of a form that is not submitted by it. */
export const button = (text, onclick, attributes = {}) =>
  h('button', { type: 'button', onclick, ...attributes }, text);

/** Replace the children of an element in one step. */
export function replace(element, ...children) {
  const fragment = document.createDocumentFragment();
  fragment.append(...present(children));
  element.replaceChildren(fragment);
}

/** Return a definition list of [term, value] pairs; pairs without a value are left out. */
export const definitions = (pairs) =>
  h(
    'dl',
    { class: 'facts' },
    pairs
      .filter(([, value]) => value !== null && value !== undefined && value !== '')
      .map(([term, value]) => h('div', {}, h('dt', {}, term), h('dd', {}, value))),
  );

/** Return a function that calls another one when it was not called for some milliseconds; `cancel` forgets a call. */
export function debounce(callee, milliseconds) {
  let timer;
  const call = (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => callee(...values), milliseconds);
  };
  return Object.assign(call, { cancel: () => clearTimeout(timer) });
}

/** Tell a screen reader about a start, an end or an error. */
export function announce(text) {
  $('#announcements').textContent = text;
}

/** Whether the reader asked for less motion. */
export const reducedMotion = () => matchMedia('(prefers-reduced-motion: reduce)').matches;

const present = (children) =>
  children.flat(2).filter((child) => child !== null && child !== undefined && child !== false);
