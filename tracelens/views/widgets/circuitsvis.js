// One CircuitsVis component, drawn from props that Python may change. The library comes with the kernel's host model, once per page.

const HUB = (globalThis.__tracelens_circuitsvis ??= { libraries: new Map(), roots: 0 });

async function library(model) {
  const version = model.get("version");
  // Widgets that start together await one and the same load; where it fails, each that waited tries with its own kernel's host.
  for (let mine = false; ; ) {
    if (!HUB.libraries.has(version)) {
      mine = true;
      const loading = load(model);
      HUB.libraries.set(version, loading);
      loading.catch(() => HUB.libraries.delete(version));
    }
    try {
      return await HUB.libraries.get(version);
    } catch (error) {
      if (mine) throw error;
    }
  }
}

async function load(model) {
  const host = await found(model);
  const unpacked = new Blob([host.get("bundle")]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = (await new Response(unpacked).text()).replace(/^\/\/# sourceMappingURL=.*$/m, "");
  const url = URL.createObjectURL(new Blob([script, "\nexport default CircuitsVis;"], { type: "text/javascript" }));
  try {
    return (await import(/* webpackIgnore: true */ url)).default;
  } finally {
    URL.revokeObjectURL(url);
  }
}

async function found(model) {
  for (let attempt = 0; ; attempt++) {
    try {
      const host = await model.widget_manager.get_model(model.get("host"));
      if (host?.get("bundle")?.byteLength) return host;
      throw new Error("the host model is not there");
    } catch (error) {
      if (attempt === 20) throw error;
      await new Promise((wake) => setTimeout(wake, 250));
    }
  }
}

// CircuitsVis writes tokens as HTML. A zero-width joiner after < and & makes text of what would be a tag or an entity, there and elsewhere.
function harmless(value) {
  if (typeof value === "string") return value.replace(/[<&]/g, "$&\u2060");
  if (Array.isArray(value)) return typeof value[0] === "string" ? value.map(harmless) : value;
  return value;
}

// CircuitsVis.render makes a new React root on every call and hands nothing back; so one root is made, of a component whose state we hold.
function mounted(vis, el, failed) {
  let instance = null;
  let drawn = null;
  const element = (type, props, key) => ({ ...vis.Hello({ name: "" }), type, props, key, ref: null });
  class Root {
    constructor(props) {
      this.props = props;
      this.state = drawn;
      instance = this;
    }
    static getDerivedStateFromError(error) {
      setTimeout(() => failed(error));
      return { type: null };
    }
    render() {
      const { type, props, key } = this.state;
      return type ? element(vis[type], props, key) : null;
    }
  }
  Root.prototype.isReactComponent = {};
  return (state) => {
    const first = drawn === null;
    drawn = state;
    if (instance) instance.updater.enqueueSetState(instance, state);
    else if (first) {
      const place = document.createElement("div");
      place.id = `tracelens-circuitsvis-${++HUB.roots}`;
      // It looks the place up by its id, and what Jupyter is about to show is not in the document yet.
      document.body.append(place);
      vis.render(place.id, Root, {});
      el.replaceChildren(place);
    }
  };
}

function render({ model, el }) {
  el.classList.add("tracelens-circuitsvis");
  const plain = () => (el.innerHTML = model.get("plain"));
  const failed = (error) => {
    plain();
    const line = document.createElement("div");
    line.setAttribute("role", "status");
    line.textContent = `CircuitsVis could not draw this (${error?.message ?? error}); the tokens are shown plainly.`;
    el.append(line);
  };
  plain();
  let show = null;
  let closed = false;
  const draw = () => {
    const props = Object.fromEntries(Object.entries(model.get("props")).map(([name, value]) => [name, harmless(value)]));
    show?.({ type: model.get("component"), props, key: model.get("key") });
  };
  model.on("change:props", draw);
  library(model).then((vis) => {
    if (closed) return;
    show = mounted(vis, el, failed);
    draw();
  }, failed);
  return () => {
    closed = true;
    model.off("change:props", draw);
    show?.({ type: null, props: {}, key: null });
  };
}

export default { render };
