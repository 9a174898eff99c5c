// The live chart on Train LoRA: loss, and how much was learned and how much else changed; kept with the saved graph.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";

const NODE = "BLIP3oTrainLora";
const EVENT = "blip3o.training";
const WIDGET = "training_chart";
const PROPERTY = "blip3o_chart";
const HEIGHT = 190;
const MOST_POINTS = 20000;
const MARGIN = { left: 40, right: 10, top: 18, bottom: 18 };
const LOSS = { label: "loss", colour: "#8ab4f8" };
const SCORES = [
  { key: "gain", label: "learned", colour: "#46a758" },
  { key: "train_gain", label: "by heart", colour: "#9aa6bd" },
  { key: "concept", label: "concept", colour: "#d68fff" },
  { key: "drift", label: "drift", colour: "#e5484d" },
];

function chartWidget(node) {
  const existing = node.widgets?.find((widget) => widget.name === WIDGET);
  if (existing) return existing;
  const canvas = document.createElement("canvas");
  canvas.style.width = "100%";
  const widget = node.addDOMWidget(WIDGET, "chart", canvas, {
    getMinHeight: () => HEIGHT,
    getMaxHeight: () => HEIGHT,
    serialize: false,
  });
  widget.serialize = false;
  widget.canvas = canvas;
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  new ResizeObserver(() => draw(canvas, node.properties[PROPERTY])).observe(canvas);
  return widget;
}

// A workflow of a stranger may hold anything under the chart's name.
function readChart(value) {
  const list = (part) => (Array.isArray(part) ? part.slice(-MOST_POINTS) : []);
  const isPoint = (part) => Array.isArray(part) && part.length === 2 && part.every(Number.isFinite);
  return {
    loss: list(value?.loss).filter(isPoint),
    scores: list(value?.scores).filter((score) => Number.isFinite(score?.step)),
    total: Number.isFinite(value?.total) ? value.total : 0,
  };
}

function show(node, value) {
  const chart = readChart(value);
  if (!chart.loss.length) return;
  node.properties[PROPERTY] = chart;
  draw(chartWidget(node).canvas, chart);
  node.setDirtyCanvas?.(true);
}

function draw(canvas, chart) {
  if (!chart?.loss?.length) return;
  const width = canvas.clientWidth || 320;
  const ratio = window.devicePixelRatio || 1;
  canvas.style.height = `${HEIGHT}px`;
  canvas.width = width * ratio;
  canvas.height = HEIGHT * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.fillStyle = "#1d2433";
  pen.fillRect(0, 0, width, HEIGHT);
  pen.font = "11px sans-serif";

  const last = Math.max(chart.total, chart.loss.at(-1)[0], 1);
  const x = (step) => MARGIN.left + (step / last) * (width - MARGIN.left - MARGIN.right);
  const inner = HEIGHT - MARGIN.top - MARGIN.bottom;
  const scale = (low, high) => (value) => MARGIN.top + inner * (1 - (value - low) / (high - low || 1));
  const losses = chart.loss.map((point) => point[1]);
  const lossY = scale(Math.min(0, ...losses), Math.max(...losses) * 1.05);
  const points = (key) => chart.scores.filter((score) => Number.isFinite(score[key])).map((score) => [score.step, score[key]]);
  const values = SCORES.flatMap(({ key }) => points(key).map((point) => point[1]));
  const scoreY = scale(Math.min(0, ...values), Math.max(1, ...values));

  drawAxes(pen, width, last, scoreY, lossY, Math.max(...losses));
  drawLine(pen, chart.loss.map(([step, loss]) => [x(step), lossY(loss)]), LOSS.colour, 2);
  for (const { key, colour } of SCORES) {
    drawLine(pen, points(key).map(([step, value]) => [x(step), scoreY(value)]), colour, 1.5, true);
  }
  drawLegend(pen, chart.scores.length ? [LOSS, ...SCORES] : [LOSS]);
}

function drawAxes(pen, width, last, scoreY, lossY, highest) {
  pen.strokeStyle = "#3a455e";
  pen.fillStyle = "#9aa6bd";
  pen.lineWidth = 1;
  for (const value of [0, 0.5, 1]) {
    pen.beginPath();
    pen.moveTo(MARGIN.left, scoreY(value));
    pen.lineTo(width - MARGIN.right, scoreY(value));
    pen.stroke();
  }
  pen.textAlign = "right";
  pen.fillText(highest.toPrecision(2), MARGIN.left - 4, lossY(highest) + 4);
  pen.fillText("0", MARGIN.left - 4, lossY(0) + 4);
  pen.fillText(`${last}`, width - MARGIN.right, HEIGHT - 5);
  pen.textAlign = "left";
  pen.fillText("0", MARGIN.left, HEIGHT - 5);
}

function drawLine(pen, points, colour, thickness, hasDots = false) {
  pen.strokeStyle = pen.fillStyle = colour;
  pen.lineWidth = thickness;
  pen.beginPath();
  points.forEach(([left, top], index) => (index ? pen.lineTo(left, top) : pen.moveTo(left, top)));
  pen.stroke();
  if (!hasDots) return;
  for (const [left, top] of points) {
    pen.beginPath();
    pen.arc(left, top, 2, 0, 2 * Math.PI);
    pen.fill();
  }
}

function drawLegend(pen, entries) {
  let left = MARGIN.left;
  for (const { label, colour } of entries) {
    pen.fillStyle = colour;
    pen.fillText(label, left, 12);
    left += pen.measureText(label).width + 12;
  }
}

// A node inside subgraphs has an id like "12:3": the way from the outermost graph down to it.
function findNode(id) {
  let graph = app.rootGraph ?? app.graph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

app.registerExtension({
  name: "BLIP3o.Training",
  setup() {
    api.addEventListener(EVENT, ({ detail }) => {
      const node = findNode(detail.node);
      if (node?.type === NODE) show(node, detail.chart);
    });
  },
  async beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.chart) show(this, output.chart[0]);
    };
    const onConfigure = nodeType.prototype.onConfigure;
    nodeType.prototype.onConfigure = function () {
      onConfigure?.apply(this, arguments);
      show(this, this.properties?.[PROPERTY]);
    };
  },
});
