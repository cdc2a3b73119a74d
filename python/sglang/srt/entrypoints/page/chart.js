// A figure that develops: its latest value, and a line of all of them.

const WIDTH = 100;
const HEIGHT = 32;

export class Chart {
  constructor(output, svg) {
    this.output = output;
    this.svg = svg;
    this.label = svg.getAttribute("aria-label");
    this.start();
  }

  start() {
    this.points = [];
    this.#draw("–");
  }

  // `at`: where on the horizontal axis, rising.
  add(at, value) {
    this.points.push([at, value]);
    this.#draw(value.toFixed(value < 100 ? 2 : 0));
  }

  #draw(text) {
    this.output.value = text;
    const last = this.points.at(-1)?.[0] || 1;
    const highest = Math.max(...this.points.map(([, value]) => value), 1e-9);
    const place = ([at, value]) => `${(WIDTH * at) / last},${HEIGHT - 2 - ((HEIGHT - 4) * value) / highest}`;
    this.svg.querySelector("polyline").setAttribute("points", this.points.map(place).join(" "));
    const reached = this.points.length ? `: ${text} at the end, ${highest.toFixed(2)} at most` : "";
    this.svg.setAttribute("aria-label", this.label + reached);
  }
}
