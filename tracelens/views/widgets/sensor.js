// The line below a widget, which a screen reader reads out when it changes; and the page's theme, told to Python.
const CSS = `
.tracelens-line { color: var(--jp-ui-font-color1, inherit); font: 13px/1.4 var(--jp-ui-font-family, system-ui, sans-serif); min-height: 1.4em; overflow-wrap: anywhere; }
.tracelens-spinner { display: inline-block; width: .8em; height: .8em; margin-right: .5em; border: 2px solid currentColor; border-right-color: transparent; border-radius: 50%; animation: tracelens-turn 1s linear infinite; }
@keyframes tracelens-turn { to { transform: rotate(1turn); } }
@media (prefers-reduced-motion: reduce) { .tracelens-spinner { animation-duration: 6s; } }
`;

// anywidget gives up, for good, a model that is not ready two seconds after it was made. A page that is drawing something large, or a slow
// machine, takes longer, and the figure that waits its turn would stay empty.
const PATIENCE = 120_000;
if (!globalThis.tracelensPatience) {
  globalThis.tracelensPatience = PATIENCE;
  const timeout = AbortSignal.timeout.bind(AbortSignal);
  AbortSignal.timeout = (milliseconds) => timeout(milliseconds === 2000 ? PATIENCE : milliseconds);
}

function dark() {
  const { jpThemeLight, vscodeThemeKind } = document.body.dataset;
  if (jpThemeLight) return jpThemeLight === 'false';
  if (vscodeThemeKind) return !vscodeThemeKind.includes('light');
  const named = document.documentElement.getAttribute('theme');
  return named ? named === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
}

// Keys without Ctrl, Cmd or Alt belong to the control that has the focus. JupyterLab has shortcuts on such keys (arrows move between
// cells, d d deletes one) and looks for them at the document before the control hears of the key; so this is earlier still, at the window.
const forControl = (event) => !(event.ctrlKey || event.metaKey || event.altKey || (event.shiftKey && event.key === 'Enter') || /^F\d/.test(event.key));

function keepKeys(el) {
  const box = () => el.closest('.tracelens');
  // JupyterLab looks for shortcuts from the control upwards, as far as an element with this attribute: on the box it would come too late.
  const mark = (event) => { if (box()?.contains(event.target)) event.target.toggleAttribute('data-lm-suppress-shortcuts', forControl(event)); };
  const leave = (event) => {
    const cell = el.closest('.jp-Cell');
    if (event.key === 'Escape' && cell && !event.defaultPrevented && box()?.contains(event.target)) cell.focus();
  };
  window.addEventListener('keydown', mark, true);
  document.addEventListener('keydown', leave);
  return () => { window.removeEventListener('keydown', mark, true); document.removeEventListener('keydown', leave); };
}

function render({ model, el }) {
  const style = document.createElement('style');
  style.textContent = CSS;
  const line = document.createElement('div');
  line.className = 'tracelens-line';
  line.setAttribute('role', 'status');
  line.setAttribute('aria-live', 'polite');
  el.append(style, line);

  const say = () => {
    const busy = model.get('busy');
    line.replaceChildren();
    if (busy) {
      const spinner = document.createElement('span');
      spinner.className = 'tracelens-spinner';
      spinner.setAttribute('aria-hidden', 'true');
      line.append(spinner);
    }
    line.append(busy || model.get('text'));
    el.closest('.tracelens')?.setAttribute('aria-busy', String(Boolean(busy)));
  };
  model.on('change:text', say);
  model.on('change:busy', say);
  say();
  const letGo = keepKeys(el);

  const tell = () => { if (model.get('dark') !== dark()) { model.set('dark', dark()); model.save_changes(); } };
  const watch = new MutationObserver(tell);
  watch.observe(document.body, { attributes: true, attributeFilter: ['data-jp-theme-light', 'data-vscode-theme-kind'] });
  const scheme = matchMedia('(prefers-color-scheme: dark)');
  scheme.addEventListener('change', tell);
  tell();

  // The widget lives: what stands in for it is not needed.
  const hide = () => document.querySelectorAll(`[data-tracelens-still="${model.get('still')}"]`).forEach((still) => {
    (still.closest('.jp-OutputArea-child') ?? still).style.display = 'none';
  });
  hide();
  requestAnimationFrame(hide);
  const later = setTimeout(hide, 500);

  return () => { letGo(); watch.disconnect(); scheme.removeEventListener('change', tell); clearTimeout(later); };
}
export default { render };
