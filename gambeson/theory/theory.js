// Line charts of precomputed numbers, drawn as SVG; the sweep's one follows its controls. No library, no network.
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const LOOKS = [['#0072B2', '', 'circle'], ['#D55E00', '', 'square'], ['#CC79A7', '5 4', 'triangle'],
  ['#009E73', '9 3 2 3', 'diamond'], ['#8a6d00', '2 3', 'circle'], ['#56B4E9', '12 4', 'square']];
const NS = 'http://www.w3.org/2000/svg';
const make = (tag, attributes, parent, text) => {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
};
const round = (value, digits) => (value === null ? '–' : value.toFixed(digits));

function marker(parent, shape, x, y, colour, size = 4) {
  const looks = { fill: colour, class: 'marker' };
  if (shape === 'circle') make('circle', { cx: x, cy: y, r: size, ...looks }, parent);
  else if (shape === 'square') make('rect', { x: x - size, y: y - size, width: 2 * size, height: 2 * size, ...looks }, parent);
  else {
    const points = shape === 'triangle' ? [[0, -1.2], [1.1, 0.9], [-1.1, 0.9]] : [[0, -1.3], [1.2, 0], [0, 1.3], [-1.2, 0]];
    make('polygon', { points: points.map(([a, b]) => `${x + a * size},${y + b * size}`).join(' '), ...looks }, parent);
  }
}

function ticks(low, high) {
  const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= raw);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-6; at += step) found.push(at);
  return [found, Math.max(0, -Math.floor(Math.log10(step) + 1e-9))];
}

// chart: {x, log, xLabel, yLabel, series: [{name, y, look, level}], digits, floor}; level: a flat dashed line
function draw(svg, keys, chart) {
  const width = Math.max(280, svg.parentElement.clientWidth - 34), height = Math.min(380, 0.62 * width + 60);
  const left = 46, right = 14, top = 22, bottom = 44;
  svg.setAttribute('viewBox', `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const values = chart.series.flatMap((s) => s.y).filter((v) => v !== null);
  let low = Math.min(...values), high = Math.max(...values);
  const pad = Math.max((high - low) * 0.08, 10 ** -chart.digits * 5);
  low = Math.max(low - pad, chart.floor ?? -Infinity); high = high + pad;
  if (chart.ceiling !== undefined) high = Math.min(high, chart.ceiling);
  const scale = chart.log ? Math.log : (v) => v;
  const from = scale(chart.x[0]), to = scale(chart.x[chart.x.length - 1]);
  const px = (v) => left + (width - left - right) * (to === from ? 0.5 : (scale(v) - from) / (to - from));
  const py = (v) => top + (height - top - bottom) * (high - v) / (high - low);
  const [marks, places] = ticks(low, high);
  for (const mark of marks) {
    make('line', { x1: left, x2: width - right, y1: py(mark), y2: py(mark), class: 'grid' }, svg);
    make('text', { x: left - 6, y: py(mark) + 4, 'text-anchor': 'end' }, svg, mark.toFixed(places));
  }
  let last = -Infinity;
  for (const value of chart.x) {
    if (px(value) - last < 30) continue;
    last = px(value);
    make('text', { x: last, y: height - bottom + 18, 'text-anchor': 'middle' }, svg, String(value));
  }
  make('text', { x: (left + width - right) / 2, y: height - 6, 'text-anchor': 'middle' }, svg, chart.xLabel);
  make('text', { x: 2, y: 12 }, svg, chart.yLabel);
  chart.series.forEach((series) => {
    const [colour, dash, shape] = LOOKS[series.look];
    const points = chart.x.map((x, i) => [px(x), series.y[i]]).filter(([, y]) => y !== null).map(([x, y]) => [x, py(y)]);
    make('polyline', { points: points.map((p) => p.join(',')).join(' '), fill: 'none', stroke: colour,
      'stroke-width': series.level ? 1.2 : 2, 'stroke-dasharray': series.level ? '3 3' : dash }, svg);
    if (!series.level) points.forEach(([x, y]) => marker(svg, shape, x, y, colour, 3.6));
  });
  const guide = make('line', { y1: top, y2: height - bottom, class: 'guide', visibility: 'hidden' }, svg);
  const tell = (at) => {
    keys.replaceChildren(...chart.series.map((series) => {
      const item = document.createElement('li'), [colour, dash, shape] = LOOKS[series.look];
      const key = make('svg', { viewBox: '0 0 36 12', 'aria-hidden': 'true' });
      make('line', { x1: 0, x2: 36, y1: 6, y2: 6, stroke: colour, 'stroke-width': 2, 'stroke-dasharray': series.level ? '3 3' : dash }, key);
      if (!series.level) marker(key, shape, 18, 6, colour, 3.6);
      const value = document.createElement('b');
      value.textContent = ' ' + round(series.y[at], chart.digits);
      item.append(key, series.name, value);
      return item;
    }));
    const item = document.createElement('li');
    item.textContent = `at ${chart.short} = ${chart.x[at]}`;
    keys.prepend(item);
    guide.setAttribute('x1', px(chart.x[at])); guide.setAttribute('x2', px(chart.x[at]));
    guide.setAttribute('visibility', 'visible');
  };
  tell(Math.min(chart.at ?? chart.x.length - 1, chart.x.length - 1));
  svg.onpointermove = svg.onpointerdown = (event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * width / box.width;
    let best = 0;
    chart.x.forEach((value, i) => { if (Math.abs(px(value) - x) < Math.abs(px(chart.x[best]) - x)) best = i; });
    tell(best);
  };
}

const sweep = data.sweep, names = Object.keys(sweep.axes), sizes = names.map((name) => sweep.axes[name].length);
const SHORT = { degrees: 'angle of μ', d: 'd', n: 'n', turn: 'angle of μ̃', c: 'c', budget: 'share' };
const START = { degrees: 0, d: 100, n: 10, turn: 0, c: 1, budget: 0 };
const state = { x: 'c' };
for (const name of names) state[name] = Math.max(0, sweep.axes[name].indexOf(START[name]));
const index = (place) => names.reduce((sum, name, i) => sum * sizes[i] + place[name], 0);

function showSweep() {
  const axis = state.x, steps = sweep.axes[axis];
  const at = (table, i) => sweep.values[table][index({ ...state, [axis]: i })] / 100;
  const series = sweep.series.map((name, k) => ({ name, look: k, y: steps.map((_, i) => at(name, i)) }));
  const best = steps.map((_, i) => {
    const place = { ...state, [axis]: i };
    return sweep.optimum[(place.degrees * sizes[1] + place.d) * sizes[5] + place.budget] / 100;
  });
  series.push({ name: 'best linear classifier', look: 4, y: best, level: true });
  const clean = axis !== 'budget' && state.budget === 0;
  draw(document.getElementById('sweep'), document.getElementById('sweep-keys'), {
    x: steps, log: ['c', 'n', 'd'].includes(axis), xLabel: sweep.told[axis], digits: 2, series, short: SHORT[axis],
    yLabel: clean ? 'clean accuracy, %' : 'robust accuracy, %', floor: 0, ceiling: 100, at: axis === 'c' ? Math.max(0, steps.indexOf(1)) : undefined,
  });
  for (const name of names) {
    const input = document.getElementById('axis-' + name);
    input.disabled = name === axis;
    input.closest('label').classList.toggle('off', name === axis);
    input.parentElement.querySelector('output').textContent = name === axis ? 'on the x axis' : sweep.axes[name][state[name]];
  }
}

function build() {
  const box = document.getElementById('controls'), choose = document.getElementById('axis');
  for (const name of names) {
    choose.append(new Option(sweep.told[name], name, name === state.x, name === state.x));
    const label = document.createElement('label'), input = document.createElement('input');
    Object.assign(input, { type: 'range', min: 0, max: sweep.axes[name].length - 1, step: 1, id: 'axis-' + name });
    input.value = state[name];
    input.addEventListener('input', () => { state[name] = Number(input.value); showSweep(); });
    label.append(sweep.told[name] + ': ', document.createElement('output'), input);
    box.append(label);
  }
  choose.addEventListener('change', () => { state.x = choose.value; showSweep(); });
}

function showOthers() {
  const stopping = data.stopping;
  const shared = { x: stopping[0].c, log: true, xLabel: 'c = |μ̃| / |μ|', short: 'c', digits: 1 };
  draw(document.getElementById('stopping'), document.getElementById('stopping-keys'), { ...shared, floor: 50, at: 3,
    yLabel: 'clean accuracy, %', series: stopping.map((row, i) => ({ name: `n = ${row.n}`, look: i, y: row.clean.map((v) => 100 * v) })) });
  draw(document.getElementById('wrong'), document.getElementById('wrong-keys'), { ...shared, floor: 0, at: 3,
    yLabel: 'wrong pseudo-labels, %', series: stopping.map((row, i) => ({ name: `n = ${row.n}`, look: i, y: row.wrong.map((v) => 100 * v) })) });
  const rows = data.transfers, over = (name) => rows.map((row) => row[name]);
  draw(document.getElementById('transfer'), document.getElementById('transfer-keys'), {
    x: over('c'), log: true, xLabel: 'c = |μ̃| / |μ|', short: 'c', digits: 3, floor: 0, at: 4, yLabel: 'distance (linf), or share',
    series: [{ name: 'gap of mean robustness', look: 0, y: over('gap') }, { name: "PORT's bound", look: 1, y: over('bound') },
      { name: 'total variation', look: 2, y: over('variation') }, { name: 'wrong labels', look: 3, y: over('wrong') }],
  });
}

build();
const all = () => { showSweep(); showOthers(); };
all();
let waiting = 0;
addEventListener('resize', () => { clearTimeout(waiting); waiting = setTimeout(all, 120); });
