"use strict";
(() => {
  const root = document.documentElement;
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const make = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);

  // Pictures: the specifications name CSS variables, which are resolved at every drawing.
  const specification = document.getElementById("figures").textContent;
  const probe = document.body.appendChild(make("i", { hidden: true }));
  const colour = (name) => {
    probe.style.color = name;
    return getComputedStyle(probe).color;
  };
  const resolve = (_, value) => (typeof value === "string" && value.startsWith("var(--") ? colour(value) : value);
  const draw = (width) => {
    if (!window.Plotly) return;
    const figures = JSON.parse(specification, resolve);
    const font = { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("var(--ink)") };
    for (const [id, { data, layout }] of Object.entries(figures)) {
      const size = width ? { width, autosize: false } : { autosize: true };
      const options = { displayModeBar: false, responsive: true };
      window.Plotly.react(id, data, { ...layout, ...size, font }, options);
    }
  };
  const unpack = async () => {
    const packed = document.getElementById("plotly");
    const bytes = Uint8Array.from(atob(packed.textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    document.head.append(make("script", { textContent: await new Response(stream).text() }));
    packed.remove();
    draw();
    root.dataset.drawn = "";
  };
  if ("DecompressionStream" in window) unpack();
  else
    for (const plot of document.querySelectorAll(".plot")) {
      plot.style.height = "auto";
      plot.textContent = "This picture needs a browser from 2023 or later. The table below holds the same numbers.";
    }

  // The arrow keys go from point to point, from left to right and line by line; what they find is shown and spoken.
  const spoken = document.getElementById("spoken");
  const stops = (plot) =>
    plot.data.flatMap(({ type, mode, hovertext = [], x }, curveNumber) => {
      const stride = mode === "lines" ? Math.ceil(hovertext.length / 20) : 1;
      const points = hovertext.map((text, pointNumber) => ({ text, x: x[pointNumber], curveNumber, pointNumber }));
      return type === "bar" ? [] : points.filter((_, i) => i % stride === 0).sort((a, b) => a.x - b.x);
    });
  for (const plot of document.querySelectorAll(".plot")) {
    let at = -1;
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step || !window.Plotly) return;
      event.preventDefault();
      const points = stops(plot);
      at = Math.min(Math.max(0, at + step), points.length - 1);
      const { text, curveNumber, pointNumber } = points[at];
      window.Plotly.Fx.hover(plot, [{ curveNumber, pointNumber }]);
      spoken.textContent = new DOMParser().parseFromString(text.replaceAll("<br>", " "), "text/html").body.textContent;
    });
    plot.addEventListener("blur", () => window.Plotly?.Fx.unhover(plot));
  }

  // Theme: the system's, until the button is pressed.
  const button = document.getElementById("theme");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
  const themed = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to the ${dark() ? "light" : "dark"} theme`);
    draw();
  };
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    themed();
  });
  prefersDark.addEventListener("change", themed);
  themed();

  // Paper is white and about 700 px wide.
  let chosen;
  addEventListener("beforeprint", () => {
    chosen = root.dataset.theme;
    root.dataset.theme = "light";
    draw(680);
  });
  addEventListener("afterprint", () => {
    if (chosen) root.dataset.theme = chosen;
    else delete root.dataset.theme;
    draw();
  });

  // Tables: sorting by the buttons in their heads, a search field, and a limit to the rows shown at first.
  const sortable = (table, changed) => {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    const compare = (a, b, up) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const difference = a - b;
      return (up ? 1 : -1) * (Number.isNaN(difference) ? a.localeCompare(b, "en", { numeric: true }) : difference);
    };
    heads.forEach((head, column) => {
      const press = make("button", { type: "button", textContent: head.textContent });
      head.replaceChildren(press);
      head.setAttribute("aria-sort", "none");
      const value = (row) => row.cells[column].dataset.value ?? (head.matches(".num") ? "" : row.cells[column].textContent);
      press.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b), up)));
        changed();
      });
    });
  };
  for (const grid of document.querySelectorAll(".grid")) {
    const table = grid.querySelector("table");
    const rows = [...table.tBodies[0].rows];
    let limit = Number(grid.dataset.limit ?? Infinity);
    const search = make("input", { type: "search", placeholder: `Search ${grid.dataset.search}` });
    search.setAttribute("aria-label", `Search ${grid.dataset.search} in: ${table.caption.textContent}`);
    const status = make("output");
    const more = make("button", { type: "button", className: "more" });
    const show = () => {
      const wanted = search.value.trim().toLowerCase();
      let matching = 0;
      let shown = 0;
      for (const row of table.tBodies[0].rows) {
        const matches = row.textContent.toLowerCase().includes(wanted);
        matching += matches;
        row.hidden = !matches || shown >= limit;
        shown += !row.hidden;
      }
      const of = (n) => n.toLocaleString("en");
      status.textContent = shown < rows.length ? `${of(shown)} of ${of(rows.length)} rows shown` : `${of(shown)} rows`;
      more.hidden = shown >= matching;
      more.textContent = `Show all ${of(matching)} rows`;
    };
    if (grid.dataset.search || limit < rows.length) {
      const tools = make("div", { className: "tools" });
      if (grid.dataset.search) tools.append(search);
      tools.append(status);
      grid.prepend(tools);
      grid.append(more);
    }
    search.addEventListener("input", show);
    more.addEventListener("click", () => {
      limit = Infinity;
      show();
      status.focus();
    });
    sortable(table, show);
    show();
  }

  // The heat map's differences in words, below the pointer or the finger.
  const tip = document.getElementById("tip");
  const hide = () => (tip.hidden = true);
  document.addEventListener("pointerover", ({ target }) => {
    const cell = target.closest?.("[data-tip]");
    if (!cell) return hide();
    tip.textContent = cell.dataset.tip;
    tip.hidden = false;
    const place = cell.getBoundingClientRect();
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, place.x + place.width / 2 - box.width / 2), innerWidth - box.width - 8);
    const above = place.bottom + 8 + box.height > innerHeight;
    tip.style.left = `${left}px`;
    tip.style.top = `${above ? place.top - box.height - 8 : place.bottom + 8}px`;
  });
  addEventListener("scroll", hide, { passive: true, capture: true });
  addEventListener("keydown", (event) => event.key === "Escape" && hide());
})();
