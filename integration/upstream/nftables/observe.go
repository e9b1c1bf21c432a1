//go:build upstream

// Our part of upstream's package: it keeps what each proxy is given. The rest of the package comes
// from upstream's module, by way of an overlay.
package nftables

import (
	"cmp"
	"maps"
	"slices"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/knftables"
)

// An observation is a proxy and the objects that it was given, as they are now.
type observation struct {
	proxier  *Proxier
	services map[types.NamespacedName]*v1.Service
	slices   map[types.NamespacedName]*discovery.EndpointSlice
}

// All observations, by proxy and by the ruleset that it writes. Upstream's tests run one after the
// other.
var (
	byProxier = map[*Proxier]*observation{}
	byRuleset = map[*knftables.Fake]*observation{}
)

func observeProxier(nft *knftables.Fake, proxier *Proxier) {
	one := &observation{
		proxier:  proxier,
		services: map[types.NamespacedName]*v1.Service{},
		slices:   map[types.NamespacedName]*discovery.EndpointSlice{},
	}
	byProxier[proxier], byRuleset[nft] = one, one
}

func observeService(proxier *Proxier, old, now *v1.Service) {
	one := byProxier[proxier]
	if one == nil {
		return
	}
	if old != nil {
		delete(one.services, name(old))
	}
	if now != nil {
		one.services[name(now)] = now.DeepCopy()
	}
}

func observeSlice(proxier *Proxier, slice *discovery.EndpointSlice, present bool) {
	one := byProxier[proxier]
	if one == nil {
		return
	}
	delete(one.slices, name(slice))
	if present {
		one.slices[name(slice)] = slice.DeepCopy()
	}
}

func name(object metav1.Object) types.NamespacedName {
	return types.NamespacedName{Namespace: object.GetNamespace(), Name: object.GetName()}
}

// sorted returns the objects by their names; never nil, which would be written as null.
func sorted[Object metav1.Object](objects map[types.NamespacedName]Object) []Object {
	byName := func(a, b Object) int { return cmp.Compare(name(a).String(), name(b).String()) }
	all := slices.AppendSeq([]Object{}, maps.Values(objects))
	slices.SortFunc(all, byName)
	return all
}
