// One figure. Plotly's own script comes once for the page, from the model that `_plotly` names, not with each figure.
const CHANGES = ['addTraces', 'restyle', 'relayout', 'update', 'animate', 'deleteTraces', 'moveTraces', 'removeLayoutProps', 'removeTraceProps']
  .map((name) => `_py2js_${name}`);

// The models of a page are made side by side: the one looked for may come a moment later.
async function other(model, id) {
  for (let left = 200; ; left--) {
    try {
      return await model.widget_manager.get_model(id);
    } catch (error) {
      if (!left) throw error;
      await new Promise((done) => setTimeout(done, 50));
    }
  }
}

// After each change plotly tells Python all that it filled in by itself, and with each move of the mouse what lies below it, and of points
// in a box also where they are. Nobody reads that, and at thousands of points it takes longer than the drawing.
function terse(module) {
  Object.assign(module.FigureView.prototype, { _sendTraceDeltas() {}, _sendLayoutDelta() {} });
  return module.default;
}

function heard(name, value) {
  if (name !== '_js2py_pointsCallback' || !value) return value;
  if (/hover$/.test(value.event_type)) return null;
  if (value.event_type !== 'plotly_selected' || !value.points) return value;
  const none = value.points.trace_indexes.map(() => 0);
  return { ...value, points: { ...value.points, xs: none, ys: none } };
}

const hearing = (model) => new Proxy(model, {
  get: (of, name) => {
    if (name === 'set') return (key, value) => of.set(key, heard(key, value));
    return typeof of[name] === 'function' ? of[name].bind(of) : of[name];
  },
});

async function load(model) {
  const url = URL.createObjectURL(new Blob([(await other(model, model.get('_plotly'))).get('code')], { type: 'text/javascript' }));
  try {
    return terse(await import(url));
  } finally {
    URL.revokeObjectURL(url);
  }
}

// Of a batch in which traces change different properties, Python writes "_undefined_" for those that one leaves as they are. Plotly's view
// reads that, but its model stores the word itself, which no figure that is drawn later can be made of: so the model reads it here.
const named = (value) => (value === '_undefined_' ? undefined : value);
const read = (styles) => styles && Object.fromEntries(Object.entries(styles).map(([name, of]) => [name, Array.isArray(of) ? of.map(named) : of]));
const STYLES = { _py2js_update: 'style_data', _py2js_restyle: 'restyle_data' };

function reading(model) {
  const get = (name) => {
    const value = model.get(name);
    return value && STYLES[name] ? { ...value, [STYLES[name]]: read(value[STYLES[name]]) } : value;
  };
  const bound = (value) => (typeof value === 'function' ? value.bind(model) : value);
  return new Proxy(model, { get: (_, name) => (name === 'get' ? get : bound(model[name])) });
}

async function make(context) {
  const { model } = context;
  const missed = [];
  const keep = Object.fromEntries(CHANGES.map((name) => [name, () => model.get(name) && missed.push([name, model.get(name)])]));
  CHANGES.forEach((name) => model.on(`change:${name}`, keep[name]));
  const page = (globalThis.tracelensPlotly ??= {});
  const key = model.get('_plotly_version');
  page[key] ??= load(model).catch((error) => { delete page[key]; throw error; });
  const figure = await (await page[key])();
  CHANGES.forEach((name) => model.off(`change:${name}`, keep[name]));
  await figure.initialize({ ...context, model: reading(model) });
  // What Python changed while the script was on its way.
  missed.forEach(([name, value]) => { model.set(name, value); model.set(name, null); });
  return figure;
}

// Plotly takes an element that is not on the page yet for 700 pixels wide.
const placed = (el) => new Promise((done) => {
  const watch = new ResizeObserver(() => { if (el.clientWidth) { watch.disconnect(); done(); } });
  watch.observe(el);
});

// Nor does it hear that the element's width changes: that of the page, or that of what stands beside it.
function following({ el, model }) {
  let last = el.clientWidth;
  const watch = new ResizeObserver(() => {
    const width = el.clientWidth;
    if (!width || Math.abs(width - last) < 2 || !el._fullLayout) return;
    last = width;
    model.set('_py2js_relayout', { relayout_data: { width }, layout_edit_id: model.get('_last_layout_edit_id'), source_view_id: null });
    model.set('_py2js_relayout', null);
  });
  watch.observe(el);
  return watch;
}

export default () => {
  let figure;
  return {
    // Not awaited: what takes more than two seconds to begin is given up.
    initialize(context) { figure = make(context); figure.catch(() => {}); },
    async render(context) {
      const made = await figure;
      await placed(context.el);
      const stop = await made.render(context);
      const follow = following(context);
      return () => { follow.disconnect(); stop?.(); };
    },
  };
};
