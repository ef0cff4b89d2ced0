/** Adapters (LoRAs) with their weights. */

import { get } from './api.js';
import { $, $$, button, h } from './dom.js';

const rows = $('#loras');
let offered = [];
let rowsMade = 0;

/** Load the adapters that the server offers; without any the group is hidden. */
export async function startLoras() {
  offered = (await get('/v1/loras')).data;
  $('#lora-group').hidden = offered.length === 0;
  $('#add-lora').addEventListener('click', () => {
    addRow(offered[0].id, 1);
    rows.lastElementChild.querySelector('select').focus();
  });
}

/** Return the adapters of the form as part of a submission. */
export function readLoras() {
  const loras = $$('li', rows).map((row) => {
    const weight = $('input', row).value;
    return { id: $('select', row).value, weight: weight === '' ? null : Number(weight) };
  });
  return loras.length ? { loras } : {};
}

/** Show the adapters of a submission. */
export function fillLoras(loras) {
  rows.replaceChildren();
  for (const { id, weight } of loras) addRow(id, weight ?? 1);
}

function addRow(id, weight) {
  const number = (rowsMade += 1);
  const select = h(
    'select',
    { id: `lora-${number}`, name: 'id' },
    offered.map((lora) => h('option', { value: lora.id }, label(lora))),
  );
  if (!offered.some((lora) => lora.id === id))
    select.append(h('option', { value: id }, `${id} (not offered)`));
  select.value = id;
  const remove = button('Remove', () => {
    row.remove();
    rows.dispatchEvent(new Event('change', { bubbles: true }));
    $('#add-lora').focus();
  });
  const row = h(
    'li',
    { class: 'row' },
    h('div', { class: 'field grow' }, h('label', { for: select.id }, 'LoRA'), select),
    h(
      'div',
      { class: 'field narrow' },
      h('label', { for: `lora-weight-${number}` }, 'Weight'),
      h('input', { id: `lora-weight-${number}`, name: 'weight', type: 'number', step: 'any', value: weight }),
    ),
    remove,
  );
  rows.append(row);
  rows.dispatchEvent(new Event('change', { bubbles: true }));
}

const label = ({ name, trigger }) => `${name}${trigger ? `, trigger “${trigger}”` : ''}`;
