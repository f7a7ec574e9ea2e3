(() => {
  "use strict";
  // Everything can be read without this: it adds searching and sorting.
  const table = document.querySelector("table.files");
  if (!table) return;
  const body = table.tBodies[0], rows = [...body.rows];
  const tools = document.querySelector(".tools"), search = document.querySelector("#search"), matches = document.querySelector("#matches");
  const chips = [...document.querySelectorAll(".chips button")];
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  let kind = "";
  tools.hidden = false;

  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const levels = chips.filter((chip) => chip.getAttribute("aria-pressed") === "true").map((chip) => chip.dataset.level);
    let count = 0;
    for (const row of rows) {
      const isShown = (!levels.length || levels.includes(row.className)) && (!kind || row.dataset.kinds.split(" ").includes(kind)) && words.every((word) => texts.get(row).includes(word));
      row.hidden = !isShown;
      count += isShown;
    }
    matches.textContent = count === rows.length ? "" : `${count.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  };
  let isWaiting = false;
  search.addEventListener("input", () => {
    kind = "";
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => { isWaiting = false; filter(); });
  });
  for (const chip of chips) chip.addEventListener("click", () => {
    kind = "";
    chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
    filter();
  });
  for (const button of document.querySelectorAll("button.show")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      kind = button.dataset.kind;
      search.value = "";
      for (const chip of chips) chip.setAttribute("aria-pressed", "false");
      filter();
      document.querySelector("#files").scrollIntoView();
    });
  }

  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      const isDown = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", isDown ? "descending" : "ascending");
      const keys = rows.map((row) => row.cells[column].dataset.order);
      const isNumeric = keys.every((key) => key !== "" && !Number.isNaN(Number(key)));
      const order = keys.map((key, place) => [isNumeric ? Number(key) : key, place]);
      const compare = new Intl.Collator("en", { numeric: true }).compare;
      order.sort((a, b) => (isNumeric ? a[0] - b[0] : compare(a[0], b[0])) || a[1] - b[1]);
      if (isDown) order.reverse();
      body.append(...order.map(([, place]) => rows[place]));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); } });
  });
})();
