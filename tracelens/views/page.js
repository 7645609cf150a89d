// Draws the page's figures, in the screen's theme and light on paper; lets tables be sorted and filtered; opens what is folded (but for
// long lists) for printing, and for links into it. Without it the page is whole but for the figures.
(() => {
  'use strict';
  const PAPER = 690; // pixels between the margins of a sheet of A4
  const themes = JSON.parse(document.getElementById('themes').textContent);
  const screen = matchMedia('(prefers-color-scheme: dark)');
  const plots = [];

  for (const plot of document.querySelectorAll('.plot')) {
    const sentence = plot.innerHTML;
    try {
      const { data, layout } = JSON.parse(plot.nextElementSibling.textContent);
      layout.template = themes[+screen.matches];
      plot.textContent = '';
      Plotly.newPlot(plot, data, layout, { displaylogo: false, responsive: true });
      plots.push(plot);
    } catch (error) {
      plot.innerHTML = sentence;
      console.error(error);
    }
  }
  const wear = (dark, width) => {
    for (const plot of plots) Plotly.relayout(plot, { template: themes[+dark], width, autosize: !width });
  };
  screen.addEventListener('change', event => wear(event.matches));

  let opened = [];
  const unfold = () => {
    opened = [...document.querySelectorAll('details:not([open]):not(.appendix)')];
    for (const part of opened) part.open = true;
    wear(false, PAPER);
  };
  const fold = () => {
    for (const part of opened) part.open = false;
    wear(screen.matches);
  };
  addEventListener('beforeprint', unfold);
  addEventListener('afterprint', fold);

  const reveal = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let part = target; part; part = part.parentElement) if (part.tagName === 'DETAILS') part.open = true;
    if (target) target.scrollIntoView();
  };
  addEventListener('hashchange', reveal);
  if (location.hash) reveal();

  // 0.934 [0.921, 0.945], < 0.001, +0.50, 1,234, 12 kB: by the first number; a dash goes last; other cells by their words.
  const key = text => {
    const found = /^[<#\s]*([+\-−]?[\d,]*\.?\d+(?:e[+-]?\d+)?)/i.exec(text);
    if (found) return [0, parseFloat(found[1].replace(/,/g, '').replace('−', '-')) - (text.trim()[0] === '<' ? 1e-12 : 0)];
    return text.trim() === '—' || !text.trim() ? [2, 0] : [1, text.trim()];
  };
  const compare = (a, b, up) => {
    const [x, y] = [key(a), key(b)];
    if (x[0] !== y[0]) return x[0] - y[0];
    return (up ? 1 : -1) * (typeof x[1] === 'string' ? x[1].localeCompare(y[1]) : x[1] - y[1]);
  };
  const sort = (table, column, head) => {
    const up = head.getAttribute('aria-sort') !== 'ascending';
    for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort((a, b) => compare(a.cells[column].textContent, b.cells[column].textContent, up)));
  };
  const filter = (table, words, said) => {
    const rows = [...table.tBodies[0].rows];
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !wanted.every(word => row.textContent.toLowerCase().includes(word));
    said.textContent = wanted.length ? `${rows.filter(row => !row.hidden).length} of ${rows.length} rows` : '';
  };
  for (const table of document.querySelectorAll('table.tools')) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = Object.assign(document.createElement('button'), { type: 'button' });
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener('click', () => sort(table, column, head));
    });
    if (table.tBodies[0].rows.length < 4) continue;
    const bar = Object.assign(document.createElement('p'), { className: 'bar' });
    const label = Object.assign(document.createElement('label'), { textContent: 'Show rows with ' });
    const input = Object.assign(document.createElement('input'), { type: 'search' });
    const said = document.createElement('output');
    label.append(input);
    bar.append(label, ' ', said);
    table.parentElement.before(bar);
    input.addEventListener('input', () => filter(table, input.value, said));
  }
  for (const section of document.querySelectorAll('section')) {
    const parts = [...section.querySelectorAll('details.card')];
    if (parts.length < 2) continue;
    const button = Object.assign(document.createElement('button'), { type: 'button', textContent: `Open all ${parts.length}` });
    button.addEventListener('click', () => {
      const closed = parts.some(part => !part.open);
      for (const part of parts) part.open = closed;
      button.textContent = closed ? 'Close all' : `Open all ${parts.length}`;
    });
    const bar = Object.assign(document.createElement('p'), { className: 'bar' });
    bar.append(button);
    parts[0].before(bar);
  }
})();
