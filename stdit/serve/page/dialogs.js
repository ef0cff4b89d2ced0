/** Dialogs: they close by Esc, by their button and by a click beside them. */

import { $, button, h, replace } from './dom.js';

/** Ask before something that cannot be undone; returns whether it was confirmed. */
export function confirmed(question, explanation, action) {
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
