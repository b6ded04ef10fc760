(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const viewer = document.querySelector(".viewer");
  const picture = viewer.querySelector(".picture");
  const image = picture.querySelector("image");
  const outlines = picture.querySelector(".regions");
  const slider = viewer.querySelector("input");
  const now = viewer.querySelector(".strip .now");
  const last = data.slices.length - 1;
  let current = data.first;
  let chosen = null; // the region that stays lit
  let pointed = null; // the region under the pointer

  function light() {
    const hot = pointed ?? chosen;
    viewer.classList.toggle("some-hot", hot !== null);
    for (const element of document.querySelectorAll("[data-region]")) {
      const is = Number(element.dataset.region);
      element.classList.toggle("hot", is === hot);
      if (element.tagName === "BUTTON") element.setAttribute("aria-pressed", String(is === chosen));
    }
  }

  function show(index) {
    current = Math.max(0, Math.min(last, index));
    image.setAttribute("href", "data:image/jpeg;base64," + data.slices[current]);
    const paths = [];
    for (const number of data.order) {
      const region = data.regions[number];
      if (!(current in region.paths)) continue;
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("d", region.paths[current]);
      path.setAttribute("fill", region.colour);
      path.setAttribute("stroke", region.colour);
      path.setAttribute("vector-effect", "non-scaling-stroke");
      path.dataset.region = number;
      const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
      title.textContent = region.phrase;
      path.append(title);
      paths.push(path);
    }
    outlines.replaceChildren(...paths);
    const words = `Slice ${current + 1} of ${last + 1}`;
    viewer.querySelector(".shown").textContent = words;
    const scores = data.regions.filter((region) => region.scores && region.scores[current] != null);
    viewer.querySelector(".scores").textContent = scores.length
      ? "Predicted IoU in this slice: " +
        scores.map((region) => `${region.phrase} ${region.scores[current].toFixed(2)}`).join(", ")
      : "";
    if (slider) {
      slider.value = current + 1;
      slider.setAttribute("aria-valuetext", words);
    }
    if (now) now.setAttribute("x", current);
    light();
  }

  function choose(number) {
    chosen = chosen === number ? null : number;
    const region = data.regions[number];
    if (chosen !== null && region.best !== null && !(current in region.paths)) show(region.best);
    light();
  }

  document.addEventListener("click", (event) => {
    const target = event.target.closest("[data-region]");
    if (target && !dragged) choose(Number(target.dataset.region));
  });
  for (const [enter, leave] of [["pointerover", "pointerout"], ["focusin", "focusout"]]) {
    document.addEventListener(enter, (event) => {
      const target = event.target.closest?.("[data-region]");
      const meant = enter === "focusin" ? target?.matches(":focus-visible") : event.pointerType !== "touch";
      if (target && meant) { pointed = Number(target.dataset.region); light(); }
    });
    document.addEventListener(leave, (event) => {
      if (event.target.closest?.("[data-region]")) { pointed = null; light(); }
    });
  }

  const masks = viewer.querySelector(".toggle");
  function toggleMasks() {
    const hidden = viewer.classList.toggle("no-masks");
    masks.setAttribute("aria-pressed", String(!hidden));
  }
  masks.addEventListener("click", toggleMasks);

  const steps = {
    ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, ArrowRight: 1,
    PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity,
  };
  picture.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "m") toggleMasks();
    else if (event.key in steps) { show(current + steps[event.key]); event.preventDefault(); }
  });

  let wheel = 0;
  picture.addEventListener("wheel", (event) => {
    if (event.ctrlKey) return; // zooms the page
    const forward = event.deltaY > 0;
    if (current === (forward ? last : 0)) return; // at the end the page scrolls on
    event.preventDefault();
    wheel += event.deltaMode === 0 ? event.deltaY : 100 * Math.sign(event.deltaY);
    const turns = Math.trunc(wheel / 100);
    wheel -= 100 * turns;
    if (turns) show(current + turns);
  }, { passive: false });

  // Dragged sideways; up and down a finger scrolls the page.
  let start = null, dragged = false;
  picture.addEventListener("pointerdown", (event) => {
    start = { x: event.clientX, slice: current };
    dragged = false;
  });
  window.addEventListener("pointermove", (event) => {
    if (start === null) return;
    const far = event.clientX - start.x;
    if (!dragged && Math.abs(far) < 6) return;
    dragged = true;
    show(start.slice + Math.round(far / Math.max(4, Math.min(24, picture.clientWidth / (last + 1)))));
  });
  for (const end of ["pointerup", "pointercancel"]) {
    window.addEventListener(end, () => {
      start = null;
      setTimeout(() => { dragged = false; }); // after the click that ends a drag, which chooses nothing
    });
  }

  if (slider) {
    slider.addEventListener("input", () => show(Number(slider.value) - 1));
    for (const button of viewer.querySelectorAll("[data-step]"))
      button.addEventListener("click", () => show(current + Number(button.dataset.step)));
  }
  const strip = viewer.querySelector(".strip");
  strip?.addEventListener("click", (event) => {
    const box = strip.getBoundingClientRect();
    show(Math.floor(((event.clientX - box.left) / box.width) * (last + 1)));
  });
  show(current);
})();
