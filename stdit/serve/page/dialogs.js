/** Dialogs: they close by Esc, by their button and by a click beside them. */

import { $, button, h, replace } from './dom.js';

/**
 * Ask before something is done; resolves to whether it was confirmed.
 *
 * `input` is a further element of the dialog, in which something can be chosen.
 */
export function confirmed(question, explanation, action, input = null) {
  const dialog = $('#confirmation');
  return new Promise((resolve) => {
    const end = (answer) => () => {
      dialog.onclose = null;
      dialog.close();
      resolve(answer);
    };
    replace(
      dialog,
      h('h2', { id: 'confirmation-heading' }, question),
      h('p', {}, explanation),
      input,
      h(
        'div',
        { class: 'buttons' },
        button('Keep', end(false), { autofocus: true }),
        button(action, end(true), { class: 'danger' }),
      ),
    );
    dialog.onclose = () => resolve(false);
    dialog.showModal();
  });
}

/** Close a dialog by a click on its backdrop. */
export function closeByBackdrop(dialog) {
  dialog.addEventListener('click', (event) => {
    if (event.target === dialog) dialog.close();
  });
}
