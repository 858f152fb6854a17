"use strict";
(() => {
  const root = document.documentElement;
  const KEY = "prunedm-language";
  const HOLD_MS = 200; // a press this long is held, a shorter one is a click
  const WIDEST = 640; // pixels of the viewer

  // a page from a file, or in a private window, may have no storage
  const stored = () => { try { return localStorage.getItem(KEY); } catch { return null; } };
  const store = (language) => { try { localStorage.setItem(KEY, language); } catch { /* as above */ } };

  function speak(language) {
    root.dataset.language = language;
    root.lang = language === "zh" ? "zh-CN" : "en";
    for (const name of ["aria-label", "alt"]) {
      for (const element of document.querySelectorAll(`[data-${language}-${name}]`)) {
        element.setAttribute(name, element.getAttribute(`data-${language}-${name}`));
      }
    }
    for (const button of document.querySelectorAll("button[data-language]")) {
      button.setAttribute("aria-pressed", String(button.dataset.language === language));
    }
  }

  const wanted = stored() || (navigator.languages || [navigator.language])[0] || "en";
  const first = wanted.toLowerCase().startsWith("zh") ? "zh" : "en";
  root.classList.add("script");
  root.dataset.language = first; // before anything is drawn

  function onPress(element, { hold, release, click }) {
    let timer = 0, held = false;
    const end = () => {
      clearTimeout(timer);
      timer = 0;
      if (held) { held = false; release(); }
    };
    element.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      timer = setTimeout(() => { held = true; timer = 0; hold(); }, HOLD_MS);
    });
    element.addEventListener("pointerup", (event) => {
      if (timer) click(event);
      end();
    });
    for (const name of ["pointercancel", "pointerleave"]) element.addEventListener(name, end);
    element.addEventListener("contextmenu", (event) => { if (held) event.preventDefault(); });
  }

  function samples(section) {
    const shape = Object.fromEntries(Object.entries(section.dataset).map(([k, v]) => [k, Number(v)]));
    const sheets = [...section.querySelectorAll(".sheet.paired")];
    const images = sheets.map((sheet) => sheet.querySelector("img"));
    const labels = sheets.map((sheet) => sheet.nextElementSibling.textContent);
    const zoom = zoomer(section.querySelector("dialog"), images, labels, shape);
    const last = images.length - 1;

    const at = (event, image) => {
      const box = image.getBoundingClientRect();
      const place = (from, size, natural, tile) =>
        Math.floor((from / size) * natural / (tile + shape.gap));
      const column = place(event.clientX - box.left, box.width, image.naturalWidth, shape.width);
      const row = place(event.clientY - box.top, box.height, image.naturalHeight, shape.height);
      return Math.min(Math.max(row * shape.columns + column, 0), shape.shown - 1);
    };

    sheets.forEach((sheet, k) => {
      const under = images[0].cloneNode();
      under.className = "under";
      under.alt = "";
      if (k) sheet.append(under);
      onPress(sheet, {
        hold: () => sheet.classList.add("held"),
        release: () => sheet.classList.remove("held"),
        click: (event) => zoom.open(at(event, images[k]), k || last),
      });
    });

    const viewer = section.querySelector(".viewer");
    if (!viewer) return;
    const stack = viewer.querySelector(".stack");
    const layers = images.map((image) => stack.appendChild(image.cloneNode()));
    layers.forEach((layer) => { layer.alt = ""; });
    const choices = [...viewer.querySelectorAll("[data-model]")];
    const differ = viewer.querySelector("[data-difference]");
    let chosen = last, difference = false, held = false;

    function draw() {
      const shown = held ? 0 : chosen;
      const subtract = difference && shown > 0;
      layers.forEach((layer, k) => layer.classList.toggle("shown", k === shown || (subtract && k === 0)));
      stack.classList.toggle("difference", subtract);
      choices.forEach((button, k) => button.setAttribute("aria-pressed", String(k === chosen)));
      differ.setAttribute("aria-pressed", String(difference));
      viewer.querySelector(".caption").textContent =
        subtract ? `|${labels[shown]} − ${labels[0]}| × 4` : labels[shown];
    }
    function choose(k) { chosen = (k + images.length) % images.length; draw(); }
    function size() {
      const natural = layers[0].naturalWidth;
      const room = Math.min(WIDEST, viewer.clientWidth);
      const whole = stack.classList.contains("pixels") ? Math.max(1, Math.floor(room / natural)) : 1;
      stack.style.width = `${Math.min(natural * whole, room)}px`;
    }
    choices.forEach((button, k) => button.addEventListener("click", () => choose(k)));
    differ.addEventListener("click", () => {
      difference = !difference;
      if (difference && chosen === 0) chosen = last;
      draw();
    });
    onPress(stack, {
      hold: () => { held = true; draw(); },
      release: () => { held = false; draw(); },
      click: (event) => zoom.open(at(event, layers[0]), chosen || last),
    });
    stack.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      zoom.open(0, chosen || last);
    });
    document.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
      if (zoom.isOpen()) { zoom.go(step); return; }
      const box = stack.getBoundingClientRect();
      const seen = box.bottom > 0 && box.top < innerHeight;
      const free = document.activeElement === document.body && seen;
      if (!free && !viewer.contains(document.activeElement)) return;
      event.preventDefault();
      choose(chosen + step);
    });
    addEventListener("resize", size);
    layers[0].decode().then(size, () => {});
    draw();
  }

  function zoomer(dialog, images, labels, shape) {
    const canvases = [...dialog.querySelectorAll("canvas")];
    const captions = [...dialog.querySelectorAll("figcaption")];
    let index = 0, model = 0;

    function draw() {
      const beside = innerWidth < 700 ? 2 : 3;
      const room = Math.min(320, (Math.min(innerWidth, 1100) - 96) / beside);
      const zoom = Math.max(1, Math.floor(room / shape.width));
      const x = (index % shape.columns) * (shape.width + shape.gap);
      const y = Math.floor(index / shape.columns) * (shape.height + shape.gap);
      [[0], [model], [0, model]].forEach((sources, k) => {
        const canvas = canvases[k], context = canvas.getContext("2d");
        canvas.width = shape.width;
        canvas.height = shape.height;
        canvas.style.width = `${shape.width * zoom}px`;
        for (const source of sources) {
          context.drawImage(images[source], x, y, shape.width, shape.height, 0, 0, shape.width, shape.height);
          context.globalCompositeOperation = "difference";
        }
        canvas.parentElement.hidden = k > 0 && model === 0;
      });
      captions[0].textContent = labels[0];
      captions[1].textContent = labels[model];
      dialog.querySelector(".position").textContent = `${index + 1} / ${shape.shown}`;
    }
    function go(step) { index = (index + step + shape.shown) % shape.shown; draw(); }

    dialog.querySelectorAll("[data-go]").forEach((button) =>
      button.addEventListener("click", () => go(Number(button.dataset.go))));
    dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    return {
      isOpen: () => dialog.open,
      go,
      open(k, m) { index = k; model = m; draw(); dialog.showModal(); },
    };
  }

  document.addEventListener("DOMContentLoaded", () => {
    speak(first);
    for (const button of document.querySelectorAll("button[data-language]")) {
      button.addEventListener("click", () => {
        store(button.dataset.language);
        speak(button.dataset.language);
      });
    }
    const section = document.querySelector("#samples");
    if (section) samples(section);
  });
})();
