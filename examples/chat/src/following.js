import { useCallback, useEffect, useState } from "react";

/** How near to the end counts as at the end. */
const nearPx = 48;
/** How long what scrolls may come after the input that it comes of. */
const inputMs = 1000;

const isAtEnd = () => scrollY + innerHeight >= document.documentElement.scrollHeight - nearPx;
const toEnd = () => scrollTo({ top: document.documentElement.scrollHeight });

/** Keeps the end of the page in view while the page grows, until its reader scrolls away from it. */
export function useFollowing() {
  const [following, setFollowing] = useState(true);
  useEffect(() => {
    let readerMs = -Infinity;
    const onInput = ({ type, target }) => {
      // A press on the root is one on its scroll bar.
      const scrolls = type === "pointerdown" ? target === document.documentElement : !target.closest("form");
      if (scrolls) readerMs = performance.now();
    };
    const onScroll = () => {
      if (isAtEnd()) setFollowing(true);
      // A page that shrinks and grows scrolls as well, and that is no wish of its reader's.
      else if (performance.now() - readerMs < inputMs) setFollowing(false);
    };
    const stop = new AbortController();
    const options = { passive: true, signal: stop.signal };
    addEventListener("scroll", onScroll, options);
    for (const type of ["wheel", "touchmove", "keydown", "pointerdown"]) {
      document.addEventListener(type, onInput, options);
    }
    return () => stop.abort();
  }, []);
  useEffect(() => {
    if (!following) return;
    const growth = new ResizeObserver(toEnd);
    growth.observe(document.body);
    return () => growth.disconnect();
  }, [following]);
  const follow = useCallback(() => setFollowing(true), []);
  return { following, follow };
}
