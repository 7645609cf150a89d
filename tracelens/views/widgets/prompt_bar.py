"""The line in which a prompt is typed, with its buttons: a run carries the text with it, so that a fast typist's last letters are in it."""

from functools import cache
from typing import Any

SCRIPT = """
function render({ model, el }) {
  el.classList.add('tracelens-bar');
  const input = document.createElement('input');
  input.type = 'text'; input.spellcheck = false; input.dir = 'auto';
  input.setAttribute('aria-label', 'prompt');
  const button = (label, title, name) => {
    const made = document.createElement('button');
    made.type = 'button'; made.textContent = label; made.title = title; made.className = name;
    return made;
  };
  const run = button('Run', 'Run both models on the prompt (Enter)', 'tracelens-run');
  const stop = button('Stop', 'Stop after the current step; what is there stays', 'tracelens-stop');
  const tell = () => { if (model.get('value') !== input.value) { model.set('value', input.value); model.save_changes(); } };
  const begin = () => model.send({ run: input.value });
  input.addEventListener('change', tell);
  input.addEventListener('keydown', (event) => {
    if (event.key === 'Escape' && !model.get('running')) return;
    event.stopPropagation();
    if (event.key === 'Enter' && !event.isComposing) begin();
    if (event.key === 'Escape') model.send({ stop: true });
  });
  run.addEventListener('click', begin);
  stop.addEventListener('click', () => model.send({ stop: true }));
  const text = () => { if (input.value !== model.get('value')) input.value = model.get('value'); };
  const hint = () => { input.placeholder = model.get('placeholder'); };
  const state = () => { stop.disabled = !model.get('running'); el.dataset.running = model.get('running'); };
  model.on('change:value', text); model.on('change:placeholder', hint); model.on('change:running', state);
  text(); hint(); state();
  el.append(input, run, stop);
  return () => { model.off('change:value', text); model.off('change:placeholder', hint); model.off('change:running', state); };
}
export default { render };
"""
LOOKS = """
.tracelens-bar { display: flex; gap: 6px; width: 100%; box-sizing: border-box; padding: 2px; }
.tracelens-bar input { flex: 1 1 auto; min-width: 0; height: 30px; padding: 0 8px; font-size: 14px; border-radius: 2px;
  color: var(--jp-ui-font-color1, inherit); background: var(--jp-input-background, transparent);
  border: 1px solid var(--jp-border-color1, #999); }
.tracelens-bar input::placeholder { color: var(--jp-ui-font-color2, inherit); opacity: .8; }
.tracelens-bar button { height: 32px; min-width: 64px; border: 1px solid var(--jp-border-color1, #999); border-radius: 2px; cursor: pointer;
  color: var(--jp-ui-font-color1, inherit); background: var(--jp-layout-color2, transparent); }
.tracelens-bar button:disabled { opacity: .45; cursor: default; }
.tracelens-bar :focus-visible { outline: 2px solid var(--jp-brand-color1, #1976d2); outline-offset: 0; }
"""


@cache
def _kind() -> Any:
    import anywidget
    import traitlets

    class PromptBar(anywidget.AnyWidget):
        _esm = SCRIPT
        _css = LOOKS
        value = traitlets.Unicode("").tag(sync=True)
        placeholder = traitlets.Unicode("").tag(sync=True)
        running = traitlets.Bool(False).tag(sync=True)

    return PromptBar


def prompt_bar(**traits: Any) -> Any:
    """A text box with Run (also Enter) and Stop (also Escape).

    Its messages are {"run": text} and {"stop": True}; its `value` is the text, its `running` says whether there is something to stop.
    """
    bar = _kind()(**traits)
    bar.add_class("tracelens-text")
    return bar
