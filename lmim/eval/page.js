"use strict";
// Values under the pointer. The page is complete without this.
for (const figure of document.querySelectorAll("figure.chart")) {
  const chart = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot");
  const svg = plot.querySelector("svg");
  const line = plot.appendChild(document.createElement("div"));
  const tip = plot.appendChild(document.createElement("div"));
  line.className = "line";
  tip.className = "tip";
  line.hidden = tip.hidden = true;

  const nearest = (sorted, x) => {
    let low = 0, high = sorted.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (sorted[middle] <= x) low = middle; else high = middle;
    }
    return x - sorted[low] < sorted[high] - x ? low : high;
  };

  const show = (event) => {
    const box = svg.getBoundingClientRect();
    const scale = box.width / chart.width;
    const x = Math.min(Math.max((event.clientX - box.left) / scale, chart.left), chart.right);
    const epoch = chart.low + (x - chart.left) / (chart.right - chart.left) * (chart.high - chart.low);
    tip.replaceChildren();
    tip.append(`epoch ${epoch.toFixed(2)}`);
    for (const series of chart.series) {
      const row = tip.appendChild(document.createElement("div"));
      const mark = row.appendChild(document.createElement("i"));
      mark.className = `c${series.colour}`;
      row.append(`${series.label} ${series.y[nearest(series.x, x)]}${chart.unit}`);
    }
    line.hidden = tip.hidden = false;
    line.style.left = `${x * scale}px`;
    line.style.top = `${chart.top * scale}px`;
    line.style.height = `${(chart.bottom - chart.top) * scale}px`;
    const left = x * scale + 12;
    tip.style.left = `${left + tip.offsetWidth > box.width ? Math.max(x * scale - 12 - tip.offsetWidth, 0) : left}px`;
    tip.style.top = `${chart.top * scale}px`;
  };
  const hide = () => { line.hidden = tip.hidden = true; };

  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", hide);
}
