/** Numbers, sizes and times as text. */

const numbers = new Intl.NumberFormat('en', { maximumFractionDigits: 6 });
const dates = new Intl.DateTimeFormat(undefined, { dateStyle: 'medium', timeStyle: 'short' });

/** Return a number with thousands separated. */
export const count = (value) => numbers.format(value);

/** Return "1 video", "2 videos". */
export const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? '' : 's'}`;

/** Return a number with few digits, such as 0.0123 or 215. */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return '–';
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e7)) return value.toExponential(2);
  return numbers.format(Number(value.toPrecision(size >= 1000 ? 5 : 3)));
}

/** Return a duration in seconds as text. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return '–';
  if (seconds < 10) return `${Math.max(0, Math.round(seconds * 10) / 10)} s`;
  if (seconds < 100) return `${Math.round(seconds)} s`;
  if (seconds < 6000) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 360) / 10} h`;
}

/** Return a number of bytes in KiB, MiB or GiB. */
export function bytes(value) {
  if (value === null || value === undefined) return '–';
  const power = Math.min(4, Math.floor(Math.log2(Math.max(1, value)) / 10));
  return `${short(value / 1024 ** power)} ${['bytes', 'KiB', 'MiB', 'GiB', 'TiB'][power]}`;
}

/** Return a time in unix seconds as a date and a time of day. */
export const date = (unix) => (unix ? dates.format(new Date(unix * 1000)) : '–');

/** Return how long ago a time in unix seconds was. */
export const ago = (unix) => (unix ? `${duration(Math.max(0, Date.now() / 1000 - unix))} ago` : '–');
