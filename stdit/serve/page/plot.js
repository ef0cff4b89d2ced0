/** Line plots in SVG: the mean of each bucket of steps, and its range as a band. */

import { h } from './dom.js';
import { count, short } from './format.js';

const HEIGHT = 200;
const MARGIN = { top: 10, right: 12, bottom: 26, left: 52 };
const WIDEST_BAND = 4; // times the range of the means; beyond it the band is cut off, so that the line can be read

let plotsMade = 0;

/** A plot of one field of one or more runs; `update` takes [{name, points: [[step, mean, min, max]]}]. */
export class Plot {
  constructor(title) {
    this.title = title;
    this.id = `plot-${(plotsMade += 1)}`;
    this.series = [];
    this.at = null;
    this.svg = svg('svg', {
      role: 'img',
      tabindex: 0,
      height: HEIGHT,
      'aria-labelledby': `${this.id}-title`,
      'aria-describedby': `${this.id}-summary`,
    });
    this.summary = h('p', { class: 'hint', id: `${this.id}-summary` });
    this.element = h(
      'figure',
      { class: 'plot' },
      h('figcaption', { id: `${this.id}-title` }, title),
      this.svg,
      this.summary,
    );
    this.svg.addEventListener('pointermove', ({ clientX }) =>
      this.read(this.stepAt(clientX - this.svg.getBoundingClientRect().left)),
    );
    this.svg.addEventListener('pointerleave', () => this.read(null));
    this.svg.addEventListener('blur', () => this.read(null));
    this.svg.addEventListener('keydown', (event) => this.step(event));
    this.resizes = new ResizeObserver(() => this.draw());
    this.resizes.observe(this.element);
  }

  update(series) {
    this.series = series.filter(({ points }) => points.length);
    this.draw();
  }

  /** Stop following the size of the page. */
  release() {
    this.resizes.disconnect();
  }

  draw() {
    this.element.hidden = this.series.length === 0;
    const width = this.element.clientWidth; // 0 while it is hidden
    if (!width || !this.series.length) return;
    this.svg.setAttribute('width', width);
    this.svg.setAttribute('viewBox', `0 0 ${width} ${HEIGHT}`);
    const all = this.series.flatMap(({ points }) => points);
    const x = scale(range(all.map(([step]) => step)), [MARGIN.left, width - MARGIN.right]);
    const y = scale(shownRange(all), [HEIGHT - MARGIN.bottom, MARGIN.top]);
    Object.assign(this, { x, y });
    const clip = svg('clipPath', { id: `${this.id}-clip` }, [
      svg('rect', {
        x: MARGIN.left,
        y: MARGIN.top - 2,
        width: width - MARGIN.left - MARGIN.right,
        height: HEIGHT - MARGIN.top - MARGIN.bottom + 4,
      }),
    ]);
    const lines = svg(
      'g',
      { 'clip-path': `url(#${this.id}-clip)` },
      this.series.flatMap((one, index) => this.line(one, index)),
    );
    this.cursor = svg('line', {
      class: 'cursor',
      y1: MARGIN.top,
      y2: HEIGHT - MARGIN.bottom,
      visibility: 'hidden',
    });
    this.svg.replaceChildren(clip, ...this.axes(width), lines, this.cursor);
    this.read(this.at);
  }

  line({ points }, index) {
    const { x, y } = this;
    const at = (step, value) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`;
    const upper = points.map(([step, , , high]) => at(step, high));
    const lower = points.map(([step, , low]) => at(step, low)).reverse();
    const mean = points.map(([step, value]) => at(step, value));
    const dot =
      points.length === 1
        ? [svg('circle', { class: `dot run-${index}`, cx: x(points[0][0]), cy: y(points[0][1]), r: 3 })]
        : [];
    return [
      svg('polygon', { class: `band run-${index}`, points: [...upper, ...lower].join(' ') }),
      svg('polyline', { class: `line run-${index}`, points: mean.join(' ') }),
      ...dot,
    ];
  }

  axes(width) {
    const { x, y } = this;
    const horizontal = ticks(y.domain, 5).flatMap((value) => [
      svg('line', {
        class: 'gridline',
        x1: MARGIN.left,
        x2: width - MARGIN.right,
        y1: y(value),
        y2: y(value),
      }),
      svg('text', { x: MARGIN.left - 6, y: y(value) + 4, 'text-anchor': 'end' }, [short(value)]),
    ]);
    const vertical = ticks(x.domain, width < 420 ? 4 : 6).map((value) =>
      svg('text', { x: x(value), y: HEIGHT - 8, 'text-anchor': 'middle' }, [count(value)]),
    );
    return [...horizontal, ...vertical];
  }

  stepAt(pixels) {
    if (!this.x) return null;
    const wanted = this.x.inverse(pixels);
    const steps = this.series.flatMap(({ points }) => points.map(([step]) => step));
    return steps.reduce(
      (best, step) => (Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best),
      steps[0],
    );
  }

  step(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !this.series.length) return;
    event.preventDefault();
    const steps = [...new Set(this.series.flatMap(({ points }) => points.map(([step]) => step)))].sort(
      (a, b) => a - b,
    );
    const now = this.at === null ? (move > 0 ? -1 : steps.length) : steps.indexOf(this.at);
    this.read(steps[Math.min(steps.length - 1, Math.max(0, now + move))]);
  }

  /** Tell the values at a step; without one, those at the end. */
  read(step) {
    this.at = step;
    if (!this.x) return;
    this.cursor.setAttribute('visibility', step === null ? 'hidden' : 'visible');
    if (step !== null) {
      this.cursor.setAttribute('x1', this.x(step));
      this.cursor.setAttribute('x2', this.x(step));
    }
    this.summary.textContent = this.series.map((one) => told(one, step)).join(' · ');
  }
}

function told({ name, points }, step) {
  if (step === null) {
    const [last, value] = points.at(-1);
    const lowest = Math.min(...points.map(([, , low]) => low));
    return `${name}: ${short(value)} at step ${count(last)}, lowest ${short(lowest)}`;
  }
  const [at, mean, low, high] = points.reduce((best, point) =>
    Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best,
  );
  return `${name}, step ${count(at)}: ${short(mean)}${low === high ? '' : ` (${short(low)} to ${short(high)})`}`;
}

function shownRange(points) {
  const [low, high] = range(points.map(([, mean]) => mean));
  const reach = Math.max(high - low, Math.abs(high) * 0.05, 1e-12) * (WIDEST_BAND / 2 - 0.5);
  const [bottom, top] = range(
    points.flatMap(([, , min, max]) => [Math.max(min, low - reach), Math.min(max, high + reach)]),
  );
  return [
    bottom === top ? bottom - 0.5 * Math.abs(bottom || 1) : bottom,
    bottom === top ? top + 0.5 * Math.abs(top || 1) : top,
  ];
}

const range = (values) =>
  values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);

/** Return a linear map from a domain to pixels. */
function scale([low, high], [from, to]) {
  const factor = (to - from) / (high - low || 1);
  const map = (value) => from + (value - low) * factor;
  map.domain = [low, high];
  map.inverse = (pixels) => low + (pixels - from) / (factor || 1);
  return map;
}

/** Return about `wanted` round values within a domain. */
export function ticks([low, high], wanted) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, index) => (first + index) * step);
}

function svg(tag, attributes, children = []) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
