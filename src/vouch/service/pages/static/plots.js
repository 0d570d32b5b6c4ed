// The plots of a comparison, drawn by Plotly in the page's own colours.
"use strict";

const PALETTE = ["#1b9e8f", "#e07a3f", "#5b7fd1", "#c2569a", "#8a9a2b", "#a0703c", "#7a68c4", "#5d8a9e", "#d1495b", "#888888"];
const CONFIG = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };

const place = document.getElementById("plots");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const chosen = (id) => document.getElementById(id).value;
const digits = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(4));

function layout(rows, more) {
  const axis = { gridcolor: colour("line"), zerolinecolor: colour("edge"), linecolor: colour("line"), automargin: true, fixedrange: true };
  return {
    height: Math.max(320, 90 + 38 * rows),
    margin: { l: 8, r: 16, t: 10, b: 44 },
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("ink") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: colour("paper"), bordercolor: colour("edge"), font: { color: colour("ink") } },
    showlegend: false,
    dragmode: false,
    ...more,
    xaxis: { ...axis, ...more.xaxis },
    yaxis: { ...axis, ...more.yaxis },
  };
}

// Names are escaped: Plotly reads a little markup in texts. (We give it none: it would set styles that the policy refuses.)
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function quality(data, metric) {
  const rows = [...data.methods].sort((a, b) => a.metrics[metric] - b.metrics[metric]);
  const traces = rows.flatMap((row) => {
    const name = plain(row.name);
    const value = row.metrics[metric];
    const interval = row.intervals[metric];
    const own = data.colours[row.slug];
    const seeds = row.seeds.map((seed) => seed[metric]).filter((each) => each !== undefined);
    return [
      { x: seeds, y: seeds.map(() => name), mode: "markers", marker: { color: own, size: 7, opacity: 0.35 }, hoverinfo: "skip" },
      {
        x: [value], y: [name], mode: "markers", marker: { color: own, size: 12 },
        error_x: interval && { type: "data", symmetric: false, array: [interval[1] - value], arrayminus: [value - interval[0]], color: own, thickness: 2.5, width: 5 },
        hovertemplate: `${name}<br>${plain(metric)} ${digits(value)}` + (interval ? `<br>${digits(interval[0])} to ${digits(interval[1])}` : "") + "<extra></extra>",
      },
    ];
  });
  return [traces, layout(rows.length, { xaxis: { title: { text: plain(metric) }, rangemode: "tozero" }, yaxis: { showgrid: false } })];
}

function trade(data, metric, cost) {
  const rows = [...data.methods].sort((a, b) => a.cost[cost] - b.cost[cost]);
  const least = 1e-4;
  const traces = rows.map((row, place) => ({
    x: [Math.max(row.cost[cost], least)], y: [row.metrics[metric]], mode: "markers+text", text: [plain(row.name)],
    textposition: place % 2 ? "bottom center" : "top center", cliponaxis: false, marker: { color: data.colours[row.slug], size: 13 },
    hovertemplate: `${plain(row.name)}<br>${plain(metric)} ${digits(row.metrics[metric])}<br>${plain(data.costs[cost])} ${digits(row.cost[cost])}<extra></extra>`,
  }));
  const values = rows.map((row) => Math.log10(Math.max(row.cost[cost], least)));
  const room = Math.max(0.4, 0.18 * (Math.max(...values) - Math.min(...values)));
  const range = [Math.min(...values) - room, Math.max(...values) + room];
  return [traces, layout(rows.length, { height: 360, xaxis: { type: "log", range, title: { text: plain(data.costs[cost]) }, dtick: Math.max(1, Math.ceil((range[1] - range[0]) / 4)), tickformat: "~g", tickangle: 0 }, yaxis: { title: { text: plain(metric) } } })];
}

function against(data) {
  const rows = data.methods.filter((row) => row.against).sort((a, b) => a.against.effect - b.against.effect);
  const traces = rows.map((row) => {
    const { effect, interval, p_value: p, significant } = row.against;
    const own = significant ? data.colours[row.slug] : colour("soft");
    return {
      x: [effect], y: [plain(row.name)], mode: "markers", marker: { color: own, size: 12, symbol: significant ? "circle" : "circle-open" },
      error_x: { type: "data", symmetric: false, array: [interval[1] - effect], arrayminus: [effect - interval[0]], color: own, thickness: 2.5, width: 5 },
      hovertemplate: `${plain(row.name)}<br>${digits(effect)} [${digits(interval[0])}, ${digits(interval[1])}]<br>p = ${p.toFixed(3)}<extra></extra>`,
    };
  });
  return [traces, layout(rows.length, { xaxis: { title: { text: `${plain(data.headline)}, difference` }, rangemode: "tozero" }, yaxis: { showgrid: false } })];
}

const short = (name) => name.replace("up to ", "≤ ").replace(" or more", "+").replace(" to ", "–");

function byGroup(data, group) {
  const names = group.names.map((name) => plain(short(name)));
  const traces = data.methods.map((row) => ({
    x: names, y: group.means[row.slug], name: plain(row.name), customdata: group.cases, mode: "lines+markers",
    line: { color: data.colours[row.slug], width: 2.2 }, marker: { size: 8 },
    hovertemplate: `${plain(row.name)}<br>%{x}: %{y:.4f}<br>%{customdata:,} cases<extra></extra>`,
  }));
  return [traces, layout(0, {
    height: 380, showlegend: true, legend: { orientation: "h", x: 0, y: 1.04, yanchor: "bottom", itemwidth: 30 },
    xaxis: { type: "category", title: { text: plain(group.by) }, tickangle: 0, tickfont: { size: 11 } },
    yaxis: { title: { text: plain(data.headline) }, rangemode: "tozero" },
  })];
}

async function draw(id, [traces, look]) {
  const element = document.getElementById(id);
  if (element) await Plotly.react(element, traces, look, CONFIG);
}

async function drawAll(data) {
  await draw("quality", quality(data, chosen("metric")));
  await draw("trade", trade(data, chosen("metric"), chosen("cost")));
  await draw("against", against(data));
  for (const [place, group] of data.groups.entries()) await draw(`group-${place}`, byGroup(data, group));
  place.dataset.drawn = "yes";
}

async function begin() {
  const answer = await fetch(place.dataset.source, { headers: { Accept: "application/json" } });
  if (!answer.ok) throw new Error(`the numbers of the plots did not come (${answer.status})`);
  const data = await answer.json();
  data.colours = Object.fromEntries(data.methods.map((row, k) => [row.slug, PALETTE[k % PALETTE.length]]));
  place.hidden = false;
  document.getElementById("no-plots").remove();
  for (const id of ["metric", "cost"]) document.getElementById(id).addEventListener("change", () => drawAll(data));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll(data));
  await drawAll(data);
}

if (place) begin();
