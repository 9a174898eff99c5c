// Shows a node's answers on the node: after a run, from ComfyUI's cache, and again when a saved graph is opened.
import { app } from "/scripts/app.js";

const NODES = new Set([
  "BLIP3oAsk",
  "BLIP3oBestOf",
  "BLIP3oCaption",
  "BLIP3oCaptionDataset",
  "BLIP3oChat",
  "BLIP3oCheckDataset",
  "BLIP3oChoose",
  "BLIP3oConvertLora",
  "BLIP3oDataset",
  "BLIP3oDownload",
  "BLIP3oOpenLora",
  "BLIP3oRewritePrompt",
  "BLIP3oSaveFeatures",
  "BLIP3oSaveLora",
  "BLIP3oTrainLora",
]);
const WIDGET = "answer_on_node";
const PROPERTY = "blip3o_answer";
// ComfyUI's own block for text that arrives while a node runs; the answer takes its place.
const STREAM_WIDGET = "$$node-text-preview";

function removeStream(node) {
  const index = node.widgets?.findIndex((widget) => widget.name === STREAM_WIDGET) ?? -1;
  if (index >= 0) {
    node.widgets[index].onRemove?.();
    node.widgets.splice(index, 1);
  }
}

function answerWidget(node) {
  const existing = node.widgets?.find((widget) => widget.name === WIDGET);
  if (existing) return existing;
  const area = document.createElement("textarea");
  area.readOnly = true;
  area.className = "comfy-multiline-input";
  area.style.minHeight = "60px";
  const widget = node.addDOMWidget(WIDGET, "text", area, {
    getValue: () => area.value,
    setValue: (value) => {
      area.value = value;
    },
    getMinHeight: () => 60,
    serialize: false,
  });
  widget.serialize = false;
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  return widget;
}

function showAnswer(node, text) {
  removeStream(node);
  answerWidget(node).value = text;
  node.properties[PROPERTY] = text;
  node.setDirtyCanvas?.(true);
}

app.registerExtension({
  name: "BLIP3o.Answers",
  async beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.has(nodeData.name)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.text) showAnswer(this, [output.text].flat().join("\n"));
    };
    const onConfigure = nodeType.prototype.onConfigure;
    nodeType.prototype.onConfigure = function () {
      onConfigure?.apply(this, arguments);
      const text = this.properties?.[PROPERTY];
      if (typeof text === "string") showAnswer(this, text);
    };
  },
});
