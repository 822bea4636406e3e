// What tools/look_at_pages.py asks a page. Each function returns what is wrong.

function where(e) { return [e.tagName.toLowerCase(), ...e.classList].join('.'); }

function start(e) { return e.textContent.trim().slice(0, 40); }

// Colours: [red, green, blue, opacity]
function colour(text) {
    const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
    return [r, g, b, a];
}

function over(top, below) { return [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1); }

function luminance(c) {
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = c.slice(0, 3).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function contrast(a, b) {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
}

// combine(element, value of its parent), once per element
function inherited(combine) {
    const known = new Map();
    return function value(e) {
        if (!known.has(e)) known.set(e, combine(e, e.parentElement && value(e.parentElement)));
        return known.get(e);
    };
}

function texts() {
    const walker = document.createTreeWalker(document.documentElement, NodeFilter.SHOW_TEXT), found = new Set();
    while (walker.nextNode()) {
        const e = walker.currentNode.parentElement, shown = e.getClientRects().length;
        if (walker.currentNode.data.trim() && shown && !e.closest('script, style, title')) found.add(e);
    }
    return [...found];
}

// The background of text in a page is that of its ancestors; in a drawing, the shapes under its middle.
function faintText(least) {
    const paper = [255, 255, 255, 1];
    const ground = inherited((e, below) => over(colour(getComputedStyle(e).backgroundColor), below || paper));
    const opacity = inherited((e, outer) => getComputedStyle(e).opacity * (outer ?? 1));
    const shapes = e => {
        const box = e.getBoundingClientRect();
        return document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2)
            .filter(s => !s.closest('text') && getComputedStyle(s).fill.startsWith('rgb')).reverse()
            .map(s => [...colour(getComputedStyle(s).fill).slice(0, 3), getComputedStyle(s).fillOpacity * opacity(s)])
            .reduce((below, top) => over(top, below), paper);
    };
    const drawing = document.documentElement.tagName === 'svg', faults = new Set();
    for (const e of texts()) {
        const style = getComputedStyle(e), ink = colour(e.closest('svg') ? style.fill : style.color);
        const below = drawing ? shapes(e) : ground(e);
        const ratio = contrast(over([...ink.slice(0, 3), ink[3] * opacity(e)], below), below);
        if (ratio < least) faults.add(`${where(e)} has a contrast of ${ratio.toFixed(1)}: ${start(e)}`);
    }
    return [...faults];
}

// Too wide, cut off without a scroll bar, names broken in the middle.
function misfits() {
    const faults = [], root = document.documentElement;
    if (root.scrollWidth > root.clientWidth) faults.push(`the page is ${root.scrollWidth} px wide`);
    for (const e of document.querySelectorAll('main *')) {
        const style = getComputedStyle(e);
        if (style.display === 'inline' || e.closest('math, svg, .plotly-figure')) continue;
        const hides = /hidden|clip/.test(style.overflowX) && e.clientWidth;
        if (hides && e.scrollWidth > e.clientWidth + 1) faults.push(`${where(e)} is cut off: ${start(e)}`);
    }
    for (const e of document.querySelectorAll('main td a, main td code')) {
        const lines = new Set([...e.getClientRects()].map(r => Math.round(r.y)));
        if (/^[\w.]+$/.test(e.textContent) && lines.size > 1) faults.push(`a name is broken: ${e.textContent}`);
    }
    return faults;
}
