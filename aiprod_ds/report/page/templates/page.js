(() => {
  "use strict";
  // Everything can be read without this: it adds values under the pointer, and the slider over a pair.
  const text = (value) => {
    const size = Math.abs(value);
    if (value === 0 || (size >= 1e-3 && size < 1e3)) return String(Number(value.toPrecision(4)));
    return size >= 1e3 && size < 1e6 ? Math.round(value).toLocaleString("en") : value.toExponential(2);
  };
  const time = (seconds) => seconds < 120 ? `${seconds.toFixed(0)} s` : seconds < 7200 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(2)} h`;
  const pointsOf = (path) => [...path.getAttribute("d").matchAll(/[ML]([-\d.]+),([-\d.]+)/g)].map((m) => [Number(m[1]), Number(m[2])]);

  for (const area of document.querySelectorAll(".area")) {
    const [left, right] = area.dataset.x.split(",").map(Number);
    const [low, high, isLog] = area.dataset.y.split(",").map(Number);
    const lines = [...area.querySelectorAll("path[data-label]")].map((path) => ({ label: path.dataset.label, path, points: null }));
    let tip = null, hair = null;
    const leave = () => { tip?.remove(); hair?.remove(); tip = hair = null; };
    area.addEventListener("pointerleave", leave);
    area.addEventListener("pointermove", (event) => {
      const box = area.getBoundingClientRect();
      const x = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * 1000;
      const rows = [];
      let at = x;
      for (const line of lines) {
        line.points ??= pointsOf(line.path);
        let best = null;
        for (const point of line.points) if (!best || Math.abs(point[0] - x) < Math.abs(best[0] - x)) best = point;
        if (!best) continue;
        const share = 1 - best[1] / 300;
        rows.push([line.label, isLog ? low * (high / low) ** share : low + share * (high - low)]);
        at = best[0];
      }
      if (!rows.length) return;
      if (!tip) {
        tip = document.createElement("div"); tip.className = "tip"; tip.setAttribute("aria-hidden", "true");
        hair = document.createElement("div"); hair.className = "hair";
        area.append(hair, tip);
      }
      const value = left + at / 1000 * (right - left);
      tip.replaceChildren();
      const lead = document.createElement("div");
      lead.textContent = area.dataset.title === "update" ? `update ${Math.round(value).toLocaleString("en")}` : time(value);
      tip.append(lead);
      for (const [label, found] of rows) {
        const row = document.createElement("div");
        row.textContent = rows.length > 1 ? `${label}: ${text(found)}` : text(found);
        tip.append(row);
      }
      hair.style.left = `${at / 10}%`;
      const half = tip.offsetWidth / 2 / box.width * 100;
      tip.style.left = `${Math.min(Math.max(at / 10, half), 100 - half)}%`;
    });
  }

  // Controls cover a small film; they come with the pointer or the focus.
  for (const film of document.querySelectorAll("video")) {
    const show = (isOn) => () => { film.controls = isOn; };
    film.controls = false;
    film.tabIndex = 0;
    for (const name of ["pointerenter", "focus"]) film.addEventListener(name, show(true));
    film.addEventListener("pointerleave", show(false));
  }

  for (const pair of document.querySelectorAll(".pair")) {
    const films = [...pair.querySelectorAll("video")];
    const tools = document.createElement("div");
    tools.className = "slide-tools";
    const press = (words) => {
      const button = document.createElement("button");
      button.type = "button"; button.textContent = words;
      tools.append(button);
      return button;
    };
    if (films.length) {
      const play = press("Play");
      play.addEventListener("click", () => {
        const isOn = films[0].paused;
        for (const film of films) isOn ? film.play().catch(() => {}) : film.pause();
      });
      for (const name of ["play", "pause"]) films[0].addEventListener(name, () => { play.textContent = films[0].paused ? "Play" : "Pause"; });
      pair.after(tools);
    }
    if (films.length === 2) {
      // Both play, pause and seek together; the second follows without a sound of its own.
      const [lead, follow] = films;
      follow.muted = true;
      let isOurs = false;
      const same = (from, to, act) => () => { if (isOurs) return; isOurs = true; act(from, to); setTimeout(() => { isOurs = false; }, 60); };
      for (const [from, to] of [[lead, follow], [follow, lead]]) {
        from.addEventListener("play", same(from, to, (a, b) => { b.currentTime = a.currentTime; b.play().catch(() => {}); }));
        from.addEventListener("pause", same(from, to, (a, b) => b.pause()));
        from.addEventListener("seeked", same(from, to, (a, b) => { if (Math.abs(b.currentTime - a.currentTime) > 0.02) b.currentTime = a.currentTime; }));
      }
    }
    if (!pair.classList.contains("can-slide")) continue;
    const button = press("Slider");
    button.setAttribute("aria-pressed", "false");
    const range = document.createElement("input");
    range.type = "range"; range.min = "0"; range.max = "100"; range.value = "50"; range.hidden = true;
    range.setAttribute("aria-label", "Original on the left of it, reconstruction on the right");
    const ends = ["original", "reconstruction"].map((word) => { const span = document.createElement("span"); span.textContent = word; span.hidden = true; return span; });
    range.addEventListener("input", () => pair.style.setProperty("--cut", `${range.value}%`));
    button.addEventListener("click", () => {
      const isOn = pair.classList.toggle("sliding");
      button.setAttribute("aria-pressed", String(isOn));
      for (const part of [range, ...ends]) part.hidden = !isOn;
    });
    tools.append(ends[0], range, ends[1]);
    pair.after(tools);
  }
})();
