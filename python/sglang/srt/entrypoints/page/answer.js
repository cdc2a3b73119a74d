// The answer's tokens in the colours of their sources, and how many came from where.

export class Answer {
  constructor(text, list) {
    this.text = text;
    this.list = list;
  }

  // Empties it for a model with `steps` draft steps (0: no speculation).
  start(prompt, steps) {
    this.steps = steps;
    this.shown = 0; // tokens whose text is complete on the page
    this.characters = 0;
    this.counts = new Array(steps + 1).fill(0);
    const span = document.createElement("span");
    span.className = "prompt";
    span.textContent = prompt;
    this.text.replaceChildren(...(prompt ? [span] : []));
    this.#list();
  }

  // Takes one event of /generate with return_token_sources; adds what is new.
  show(event) {
    const { output_token_sources: sources, output_text_offsets: offsets, finish_reason: end } = event.meta_info;
    const characters = Array.from(event.text); // offsets count code points
    const atEnd = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 40;
    for (; this.shown < sources.length; this.shown++) {
      const to = offsets[this.shown];
      if (to > characters.length && !end) break; // held back: it may become a stop string
      this.#token(characters.slice(this.characters, to).join(""), sources[this.shown]);
      this.characters = Math.min(to, characters.length);
    }
    this.#list();
    if (atEnd) this.text.scrollTop = this.text.scrollHeight;
  }

  #token(text, source) {
    this.counts[source]++;
    if (!text) return; // a special token, or the first half of a character
    const span = document.createElement("span");
    colour(span, "token", source, this.steps);
    span.dataset.source = source;
    span.title = name(source);
    span.textContent = text;
    this.text.append(span);
  }

  #list() {
    const most = Math.max(1, ...this.counts);
    this.list.replaceChildren(
      ...this.counts.map((count, source) => {
        const item = element("li");
        const label = element("span", "name");
        const swatch = colour(element("span"), "swatch", source, this.steps);
        label.append(swatch, name(source));
        const track = element("span", "track");
        const bar = colour(element("div"), "swatch", source, this.steps);
        bar.style.setProperty("--part", count / most);
        track.append(bar);
        const number = element("span", "count");
        number.textContent = count;
        item.append(label, track, number);
        return item;
      }),
    );
  }
}

const name = (source) => (source ? `accepted draft ${source}` : "target's own");

function element(tag, className = "") {
  const made = document.createElement(tag);
  made.className = className;
  return made;
}

function colour(made, className, source, steps) {
  made.className = source ? className : `${className} own`;
  made.style.setProperty("--share", steps > 1 ? (source - 1) / (steps - 1) : 0);
  return made;
}
