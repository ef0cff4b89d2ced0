/** Errors beside the field that caused them. */

import { $, $$, announce, h } from './dom.js';

/** Remove all errors within a form; those of files stay until another file is chosen. */
export function clearErrors(form) {
  for (const error of $$('.error[data-param]:not([data-param=file])', form)) removeError(error);
  $('[role=alert]', form).textContent = '';
}

/** Remove the error beside one control. */
export function clearError(control) {
  const ids = (control.getAttribute('aria-describedby') ?? '').split(' ');
  for (const error of ids.map((id) => document.getElementById(id))) {
    if (error?.matches('.error[data-param]')) removeError(error);
  }
}

/** Show an error of the server beside its field, or in the alert of the form if it names none. */
export function showError(form, error, { focus = true } = {}) {
  const control = controlOf(form, error.param);
  if (!control) {
    $('[role=alert]', form).textContent = error.message;
    return;
  }
  showFieldError(control, error.message, error.param);
  control.closest('details')?.setAttribute('open', '');
  if (focus) {
    announce(error.message);
    control.focus();
    control.scrollIntoView({ block: 'nearest' });
  }
}

/** Show a message beside a control. */
export function showFieldError(control, message, param = control.name) {
  clearError(control);
  const id = `error-${param.replace(/\W+/g, '-')}`;
  document.getElementById(id)?.remove();
  const error = h('p', { class: 'error', id, 'data-param': param }, message);
  const field = control.closest('.field');
  if (field) field.append(error);
  else control.after(error);
  const others = (control.getAttribute('aria-describedby') ?? '')
    .split(' ')
    .filter((one) => one && one !== id);
  control.setAttribute('aria-describedby', [...others, id].join(' '));
  control.setAttribute('aria-invalid', 'true');
}

/** Show beside a file input why a file was refused. */
export function showFileError(chooser, file, { message }) {
  const named = message.startsWith(file.name) ? message : `${file.name}: ${message}`;
  showFieldError(chooser, named, 'file');
  announce(named);
}

function removeError(error) {
  for (const control of $$(`[aria-describedby~="${error.id}"]`)) {
    const others = control
      .getAttribute('aria-describedby')
      .split(' ')
      .filter((id) => id !== error.id);
    if (others.length) control.setAttribute('aria-describedby', others.join(' '));
    else control.removeAttribute('aria-describedby');
    control.removeAttribute('aria-invalid');
  }
  error.remove();
}

/** Return the control of a field such as `num_frames`, `conditions[1].frame` or `loras.0.weight`; or null. */
function controlOf(form, param) {
  if (!param) return null;
  const [field = '', index, key] = param.split(/[.[\]]+/).filter(Boolean);
  const row = index === undefined ? null : $$(`[data-rows="${CSS.escape(field)}"] > li`, form)[Number(index)];
  const candidates = [
    key && row && $(`[name="${CSS.escape(key)}"]`, row),
    row && $('input, select, textarea', row),
    ...$$(`[data-param-name="${CSS.escape(param)}"]`, form),
    ...$$(`[name="${CSS.escape(field)}"]`, form),
    ...$$(`[data-field~="${CSS.escape(field)}"] :is(input, select, textarea)`, form),
  ];
  return candidates.find((control) => control && !control.disabled && !control.closest('[hidden]')) ?? null;
}
