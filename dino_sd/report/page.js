"use strict";
(async () => {
  const [documents, items] = JSON.parse(document.getElementById("curves").textContent);
  await Bokeh.embed.embed_items(documents, items);
  const figures = () => [...Bokeh.documents[0].roots()];
  if (matchMedia("(pointer: coarse)").matches) {
    // A finger on a chart scrolls the page, until a tool is tapped.
    for (const figure of figures()) for (const tool of figure.toolbar.tools) {
      if (tool.active && tool.type === "BoxZoomTool") tool.active = false;
    }
  }
  const figureIn = new Map();
  for (const [root, element] of Object.entries(items[0].roots)) {
    figureIn.set(element, Bokeh.documents[0].get_model_by_id(root));
  }
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      for (const plot of button.closest("figure").querySelectorAll(".plot")) {
        for (const line of figureIn.get(plot.id).renderers) {
          if (line.tags[0] === Number(button.dataset.line)) line.visible = shown;
        }
      }
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    // Charts read their colours when they are painted.
    for (const figure of figures()) figure.properties.min_border.change.emit();
  });
})();
for (const button of document.querySelectorAll("button.scale")) {
  button.addEventListener("click", () => {
    const plots = button.closest("figure").querySelectorAll(".plot");
    for (const plot of plots) plot.hidden = !plot.hidden;
    button.textContent = plots[0].hidden ? "linear scale" : "log scale";
  });
}
for (const row of document.querySelectorAll(".steps")) {
  const buttons = [...row.querySelectorAll("button")];
  buttons.forEach((button, place) => button.addEventListener("click", () => {
    buttons.forEach((each, other) => each.setAttribute("aria-pressed", String(other === place)));
    row.parentElement.querySelectorAll(".moment").forEach((moment, other) => { moment.hidden = other !== place; });
  }));
}
