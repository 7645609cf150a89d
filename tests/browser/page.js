// Loaded into every page before its own scripts: what the tests ask of JupyterLab and of plotly.
window.tracelens = {
  // The notebook that is open.
  panel: null,

  async open(path) {
    this.panel = await jupyterapp.commands.execute('docmanager:open', { path });
    await this.panel.revealed;
    await this.panel.sessionContext.ready;
    jupyterapp.shell.activateById(this.panel.id);
  },

  // Closes the notebook; what was not saved is lost.
  leave() {
    this.panel.dispose();
    this.panel = null;
  },

  ready() {
    const kernel = this.panel?.sessionContext.session?.kernel;
    return kernel?.status === 'idle' && this.panel.content.widgets.length > 0;
  },

  command: (name, args) => jupyterapp.commands.execute(name, args),

  // The kernel, once it has answered what the widgets sent: they hold a change back while one is under way.
  async calm() {
    const kernel = this.panel.sessionContext.session.kernel;
    const pause = () => new Promise((done) => setTimeout(done, 40));
    for (let quiet = 0; quiet < 3; await pause()) quiet = kernel.status === 'idle' ? quiet + 1 : 0;
    return kernel;
  },

  // A Python expression's value in the kernel, without a cell.
  async ask(expression) {
    const kernel = await this.calm();
    const code = `__import__("json").dumps(${expression})`;
    const reply = await kernel.requestExecute({ code: '', silent: false, store_history: false, user_expressions: { it: code } }).done;
    const it = reply.content.user_expressions.it;
    if (it.status !== 'ok') throw new Error(`${it.ename}: ${it.evalue}`);
    return it.data['text/plain'];
  },

  async does(code) {
    const kernel = await this.calm();
    const reply = await kernel.requestExecute({ code, store_history: false }).done;
    if (reply.content.status !== 'ok') throw new Error(`${reply.content.ename}: ${reply.content.evalue}`);
  },

  // Every figure that has a place on the page is drawn in it.
  drawn() {
    const shown = [...document.querySelectorAll('.jp-OutputArea-output :is(.js-plotly-plot, .tracelens-figure)')].filter((e) => e.offsetParent);
    const text = document.querySelector('.jp-Notebook')?.innerText ?? '';
    return shown.every((e) => e.querySelector('.main-svg')) && !text.includes('Loading widget');
  },

  plot(css) {
    const root = document.querySelector(css);
    if (!root) throw new Error(`nothing on the page is ${css}`);
    const plot = root.matches('.js-plotly-plot') ? root : root.querySelector('.js-plotly-plot') ?? root.closest('.js-plotly-plot');
    if (!plot) throw new Error(`no plotly figure in ${css}`);
    return plot;
  },

  // Where a place in data coordinates of a trace's axes lies in the window.
  pixel(css, trace, x, y) {
    const plot = this.plot(css);
    const full = plot._fullData[trace];
    const axis = (name) => plot._fullLayout[name.replace(/^([xy])(\d*)$/, '$1axis$2')];
    const [xa, ya] = [axis(full.xaxis), axis(full.yaxis)];
    const box = plot.getBoundingClientRect();
    return [box.left + xa._offset + xa.d2p(x), box.top + ya._offset + ya.d2p(y)];
  },

  // A point's place: number of the point, or [row, column] of a heatmap.
  point(css, trace, index) {
    const plot = this.plot(css);
    const full = plot._fullData[trace];
    const at = (values, i, start, step) => (values?.length ? values[i] : (start ?? 0) + i * (step ?? 1));
    let [row, column] = Array.isArray(index) ? index : [index, index];
    let [x, y] = [at(full.x, column, full.x0, full.dx), at(full.y, row, full.y0, full.dy)];
    // The middle of a bar can be hit even if it is at the axis's end.
    if (full.type === 'bar') full.orientation === 'h' ? (x = x / 2) : (y = y / 2);
    return this.pixel(css, trace, x, y);
  },

  hovered(css) {
    return (this.plot(css)._hoverdata ?? []).map((p) => ({ trace: p.curveNumber, point: p.pointNumber ?? p.pointIndex }));
  },

  // From the first input to the first frame in which `expression` holds; see `latency` in shown.py.
  watch(expression) {
    const holds = new Function(`return Boolean(${expression})`);
    if (holds()) throw new Error(`holds before anything was done: ${expression}`);
    let begun = null;
    const inputs = ['pointerdown', 'pointerup', 'keydown', 'input', 'change', 'wheel'];
    const begin = (event) => { begun ??= event.timeStamp; };
    inputs.forEach((name) => window.addEventListener(name, begin, { capture: true }));
    this.measured = null;
    const look = () => {
      if (begun !== null && holds()) {
        this.measured = performance.now() - begun;
        inputs.forEach((name) => window.removeEventListener(name, begin, { capture: true }));
      } else requestAnimationFrame(look);
    };
    requestAnimationFrame(look);
  },
};
