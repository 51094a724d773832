"use strict";
// Fills in images, draws the charts in the colours of the style sheet, and shows what is pointed at. Texts are set as text.
(() => {
  const images = JSON.parse(document.getElementById("images").textContent);
  const source = (row) => row in images ? "data:image/webp;base64," + images[row] : null;

  for (const img of document.querySelectorAll("img[data-row]")) img.src = source(img.dataset.row) ?? "";

  // --- one image, enlarged
  const viewer = document.getElementById("viewer");
  const shown = (box, row, reason, alt) => {
    const img = box.querySelector("img"), missing = box.querySelector(".missing"), data = row === undefined ? null : source(row);
    img.hidden = !data;
    if (data) { img.src = data; img.alt = alt; }
    if (missing) { missing.hidden = Boolean(data); missing.textContent = reason ?? "no image in this page"; }
  };
  const open = (title, facts, row, reason) => {
    viewer.querySelector("h2").textContent = title;
    viewer.querySelector("dl").replaceChildren(...facts.map(([name, value]) => {
      const line = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd");
      dt.textContent = name; dd.textContent = value; line.append(dt, dd);
      return line;
    }));
    shown(viewer, row, reason, title);
    viewer.showModal();
  };
  document.addEventListener("click", (event) => {
    const tile = event.target.closest?.(".tile");
    if (tile) open(tile.dataset.title, JSON.parse(tile.dataset.facts), tile.dataset.image, tile.dataset.reason);
    if (event.target === viewer) viewer.close();
  });

  // --- charts
  if (!window.Plotly) return;
  const style = () => getComputedStyle(document.documentElement);
  const coloured = (value, css) => {
    if (typeof value === "string") {
      const name = /^var\((--[a-z0-9-]+)\)$/.exec(value);
      return name ? css.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => coloured(item, css));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, coloured(item, css)]));
    return value;
  };
  const plots = [...document.querySelectorAll("[data-chart]")].map((box) => (
    { box, figure: JSON.parse(document.getElementById(box.dataset.chart).textContent), isMap: box.classList.contains("map") }
  ));
  const draw = ({ box, figure, isMap }) => {
    const css = style(), { data, layout } = coloured({ data: figure.data, layout: figure.layout }, css);
    const line = css.getPropertyValue("--line").trim(), before = box.layout;
    for (const axis of ["xaxis", "yaxis"]) {
      layout[axis] = { gridcolor: line, linecolor: line, ...layout[axis] };
      if (isMap && before) layout[axis] = { ...layout[axis], range: before[axis].range, autorange: before[axis].autorange };
    }
    const hover = { bgcolor: css.getPropertyValue("--panel").trim(), bordercolor: line, font: { color: css.getPropertyValue("--text").trim() } };
    return Plotly.react(box, data, {
      ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hoverlabel: hover,
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css.getPropertyValue("--text").trim() },
    }, { displayModeBar: false, responsive: true, scrollZoom: isMap, doubleClick: isMap ? "reset" : false });
  };
  const all = () => plots.map(draw);
  all();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  for (const details of document.querySelectorAll("details"))
    details.addEventListener("toggle", () => plots.filter(({ box }) => details.contains(box)).forEach(({ box }) => Plotly.Plots.resize(box)));

  // --- print in light colours, with everything open
  let closed = [];
  addEventListener("beforeprint", () => {
    document.documentElement.dataset.print = "";
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((details) => { details.open = true; });
    all();
  });
  addEventListener("afterprint", () => {
    delete document.documentElement.dataset.print;
    closed.forEach((details) => { details.open = false; });
    all();
  });

  // --- the map: what is pointed at, buttons and keys
  const tip = document.getElementById("tip");
  for (const { box, figure } of plots.filter(({ isMap }) => isMap)) {
    const point = (event) => figure.points[event.points[0].customdata];
    box.on("plotly_hover", (event) => {
      const { title, row, reason } = point(event);
      shown(tip, row, reason, title);
      tip.querySelector("span").textContent = reason ? `${title}\n${reason}` : title;
      tip.hidden = false;
      const { clientX: x, clientY: y } = event.event, { offsetWidth: width, offsetHeight: height } = tip;
      tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 4))}px`;
      tip.style.top = `${y + 14 + height < innerHeight ? y + 14 : Math.max(4, y - 14 - height)}px`;
    });
    box.on("plotly_unhover", () => { tip.hidden = true; });
    box.on("plotly_click", (event) => { const { title, facts, row, reason } = point(event); tip.hidden = true; open(title, facts, row, reason); });
    const move = (scale, dx = 0, dy = 0) => {
      const next = {};
      for (const [axis, shift] of [["xaxis", dx], ["yaxis", dy]]) {
        const [low, high] = box.layout[axis].range, half = (high - low) / 2 * scale, middle = (low + high) / 2 + shift * (high - low);
        next[`${axis}.range`] = [middle - half, middle + half];
      }
      Plotly.relayout(box, next);
    };
    const whole = () => Plotly.relayout(box, { "xaxis.autorange": true, "yaxis.autorange": true });
    const does = { in: () => move(0.6), out: () => move(1 / 0.6), whole };
    for (const button of document.querySelectorAll(`[data-map="${box.id}"]`))
      button.addEventListener("click", does[button.dataset.does]);
    const keys = { "+": does.in, "=": does.in, "-": does.out, "0": whole, ArrowLeft: () => move(1, -0.15), ArrowRight: () => move(1, 0.15),
      ArrowUp: () => move(1, 0, 0.15), ArrowDown: () => move(1, 0, -0.15) };
    box.addEventListener("keydown", (event) => {
      if (event.key in keys && !event.ctrlKey && !event.metaKey) { keys[event.key](); event.preventDefault(); }
    });
    // the wheel zooms a map that was clicked or focused, or with Ctrl; else the page goes on scrolling
    box.parentElement.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && document.activeElement !== box) event.stopPropagation();
    }, { capture: true, passive: true });
    box.addEventListener("pointerdown", () => box.focus({ preventScroll: true }));
  }
})();
