/** Requests to the server; every failure is an ApiError in the server's words. */

const RETRIES = 3;
const BACKOFF_MS = 500;

/** An error of the server: `param` names the field that caused it, or is null. */
export class ApiError extends Error {
  constructor(message, { param = null, code = null, status = 0 } = {}) {
    super(message);
    Object.assign(this, { param, code, status });
  }
}

/** Return the JSON of a GET request. */
export const get = (path, options = {}) => request(path, options);

/** Return the JSON of a DELETE request. */
export const remove = (path) => request(path, { method: 'DELETE' });

/** Return the JSON of a POST request, repeated with the same idempotency key if the network fails. */
export function post(path, body = {}, { signal, key = newKey(), retries = RETRIES } = {}) {
  const headers = { 'Content-Type': 'application/json', 'Idempotency-Key': key };
  return retried(() => request(path, { method: 'POST', headers, body: toJSON(body), signal }), retries);
}

/** Return the JSON of a POST request with one file. */
export function postFile(path, file) {
  const headers = { 'Idempotency-Key': newKey() };
  return retried(() => {
    const body = new FormData();
    body.append('file', file, file.name);
    return request(path, { method: 'POST', headers, body });
  }, RETRIES);
}

/** Return a path with each part encoded, such as of a run or a video. */
export const path = (...parts) => '/' + parts.map((part) => encodeURIComponent(part)).join('/');

/** Return the address of a file of a video: video, thumbnail, preview or settings. */
export const contentUrl = (id, variant = 'video', download = false) =>
  `${path('v1', 'videos', id, 'content')}?variant=${variant}${download ? '&download=1' : ''}`;

/** Return a new idempotency key; crypto.randomUUID is missing on plain http from another machine. */
export function newKey() {
  if (crypto.randomUUID) return crypto.randomUUID();
  return [...crypto.getRandomValues(new Uint8Array(16))].map((n) => n.toString(16).padStart(2, '0')).join('');
}

async function request(address, options) {
  let response;
  try {
    response = await fetch(address, options);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError('The server does not answer: check that it runs.', { code: 'network' });
  }
  if (response.status === 401) dispatchEvent(new Event('login-required'));
  const text = await response.text();
  const answer = parsed(text);
  if (response.ok && answer !== undefined) return answer;
  const { message, param, code } = answer?.error ?? {};
  throw new ApiError(message ?? `The server answered ${response.status} ${response.statusText}.`, {
    param,
    code,
    status: response.status,
  });
}

async function retried(send, retries) {
  for (let tried = 0; ; tried += 1) {
    try {
      return await send();
    } catch (error) {
      if (error.code !== 'network' || tried === retries) throw error;
      await new Promise((resolve) => setTimeout(resolve, BACKOFF_MS * 2 ** tried));
    }
  }
}

/** Parse JSON; seeds beyond 2^53 stay text, since a number would round them. */
function parsed(text) {
  try {
    if (!/"seed":\s*\d{16}/.test(text)) return JSON.parse(text);
    return JSON.parse(text, (name, value, context) =>
      name === 'seed' && !Number.isSafeInteger(value) && context ? context.source : value,
    );
  } catch {
    return undefined;
  }
}

function toJSON(body) {
  return JSON.stringify(body, (name, value) =>
    name === 'seed' && typeof value === 'string' && /^\d+$/.test(value)
      ? (JSON.rawJSON?.(value.replace(/^0+(?=\d)/, '')) ?? Number(value))
      : value,
  );
}
