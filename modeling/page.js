'use strict';
// The page is complete without this script. The script sorts tables, filters pictures and switches matrices.
const byId = id => document.getElementById(id), all = (selector, root = document) => [...root.querySelectorAll(selector)];
document.documentElement.classList.add('js');
all('[data-needs-js]').forEach(element => { element.hidden = false; });
function makeButton(parent, className) {
  const button = document.createElement('button');
  button.type = 'button';
  button.className = className;
  button.append(...parent.childNodes);
  parent.append(button);
  return button;
}
for (const head of all('table.sort th[data-k]')) {
  const table = head.closest('table'), valueOf = row => row.cells[head.cellIndex].dataset.v ?? row.cells[head.cellIndex].textContent.trim();
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  head.setAttribute('aria-sort', head.dataset.on || 'none');
  makeButton(head, 'sorter').onclick = () => {
    const direction = head.getAttribute('aria-sort') === 'descending' ? 'ascending' : 'descending', sign = direction === 'ascending' ? 1 : -1;
    all('th[aria-sort]', table).forEach(other => other.setAttribute('aria-sort', 'none'));
    head.setAttribute('aria-sort', direction);
    [...table.tBodies[0].rows].sort((a, b) => sign * compare(valueOf(a), valueOf(b))).forEach(row => table.tBodies[0].append(row));
  };
}
if (byId('gal')) {
  const tiles = [...byId('gal').children];
  let kind = all('.chip[data-kind]')[0].dataset.kind, cell = null, pages = 1;
  const isWanted = ({dataset: tile}) => {
    if (byId('cls').value !== '' && tile.t !== byId('cls').value) return false;
    if (cell) return tile.t === cell.t && tile.p.split(',')[cell.k] === cell.p;
    if (kind === 'pair') return tile.r[byId('A').value] === '1' && tile.r[byId('B').value] === '0';
    return tile.k.split(' ').includes(kind);
  };
  const draw = () => {
    const wanted = tiles.filter(isWanted);
    tiles.forEach(tile => { tile.hidden = true; });
    wanted.slice(0, 12 * pages).forEach(tile => { tile.hidden = false; });
    byId('count').textContent = `${wanted.length} ${wanted.length === 1 ? 'picture' : 'pictures'} on this page${cell ? `, of ${cell.n} such errors` : ''}`;
    byId('more').hidden = wanted.length <= 12 * pages;
    all('.chip[data-kind]').forEach(chip => chip.setAttribute('aria-pressed', !cell && chip.dataset.kind === kind));
    byId('pair').hidden = Boolean(cell) || kind !== 'pair';
  };
  const choose = (newKind, newCell) => { kind = newKind; cell = newCell; pages = 1; draw(); };
  all('.chip[data-kind]').forEach(chip => { chip.onclick = () => choose(chip.dataset.kind, null); });
  ['A', 'B', 'cls'].forEach(id => { byId(id).onchange = () => choose(kind, id === 'cls' ? cell : null); });
  byId('more').onclick = () => { pages++; draw(); };
  for (const place of all('td.e')) {
    const row = place.parentNode, table = place.closest('table'), head = table.tHead.rows[0].cells[place.cellIndex];
    const found = {t: row.dataset.t, p: row.dataset.p ?? head.dataset.p, k: table.dataset.k ?? head.dataset.k, n: place.textContent};
    const predicted = row.dataset.p ? row.cells[1].title : head.title, model = table.dataset.name ?? head.title, button = makeButton(place, 'cell');
    button.setAttribute('aria-label', `${row.cells[0].title} taken for ${predicted} by ${model}: ${found.n}, show pictures`);
    button.onclick = () => { byId('cls').value = ''; choose(kind, found); byId('pictures').scrollIntoView({behavior: matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth'}); };
  }
  draw();
}
const showPanel = k => { all('[data-panel]').forEach(panel => { panel.hidden = panel.dataset.panel !== k; }); all('[data-tab]').forEach(tab => tab.setAttribute('aria-pressed', tab.dataset.tab === k)); };
all('[data-tab]').forEach(tab => { tab.onclick = () => showPanel(tab.dataset.tab); });
if (all('[data-tab]').length) showPanel('0');
addEventListener('beforeprint', () => all('details:not(.screen)').forEach(fold => { fold.open = true; }));
