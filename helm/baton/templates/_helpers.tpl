{{- define "baton.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "baton.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "baton.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "baton.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* One generation of workers and routers; a change of anything that makes KV makes another. */}}
{{- define "baton.revision" -}}
{{- if .Values.revision -}}
{{- .Values.revision -}}
{{- else -}}
{{- $made := list .Values.model .Values.image (include "baton.setSettings" .) .Chart.AppVersion .Values.tls.workers (include "baton.registryPort" .) -}}
{{- toJson $made | sha256sum | trunc 10 -}}
{{- end -}}
{{- end -}}

{{- define "baton.setSettings" -}}
{{- list .Values.prefill.settings .Values.decode.settings .Values.unified.settings .Values.prefill.gpus .Values.decode.gpus .Values.unified.gpus | toJson -}}
{{- end -}}

{{/* Labels that select: they never change. Takes a list: root, component. */}}
{{- define "baton.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "baton.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "baton.labels" -}}
{{- $root := index . 0 -}}
{{ include "baton.selector" . }}
app.kubernetes.io/part-of: baton
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of a pod: routers look for workers by part-of, instance and revision. */}}
{{- define "baton.podLabels" -}}
{{ include "baton.labels" . }}
baton.dev/revision: {{ include "baton.revision" (index . 0) | quote }}
{{- end -}}

{{- define "baton.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- $name := $image.repository -}}
{{- if $root.Values.image.registry -}}
{{- $name = printf "%s/%s" $root.Values.image.registry $image.repository -}}
{{- end -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $name $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default $root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "baton.routerAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ include "baton.fullname" . }}-router
{{- else -}}
{{ default "default" .Values.serviceAccount.routerName }}
{{- end -}}
{{- end -}}

{{- define "baton.workerAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{ include "baton.fullname" . }}-worker
{{- else -}}
{{ default "default" .Values.serviceAccount.workerName }}
{{- end -}}
{{- end -}}

{{/* Not empty where clients need TLS or a key: workers register at a door of their own then. */}}
{{- define "baton.workersApart" -}}
{{- if or .Values.tls.enabled .Values.apiKeys.secretName -}}apart{{- end -}}
{{- end -}}

{{- define "baton.workersTlsSecret" -}}
{{- default (printf "%s-workers-tls" (include "baton.fullname" .)) .Values.tls.workers.secretName -}}
{{- end -}}

{{- define "baton.tlsSecret" -}}
{{- default (printf "%s-tls" (include "baton.fullname" .)) .Values.tls.secretName -}}
{{- end -}}

{{/* The port where workers register, and where probes ask: no client's credentials are needed there. */}}
{{- define "baton.registryPort" -}}
{{- if include "baton.workersApart" . -}}50052{{- else -}}50051{{- end -}}
{{- end -}}

{{- define "baton.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "baton.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
privileged: false
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Volumes that every pod writes to, its root file system being read-only. */}}
{{- define "baton.scratch" -}}
- name: tmp
  emptyDir: {sizeLimit: 1Gi}
- name: home
  emptyDir: {sizeLimit: 1Gi}
{{- end -}}

{{- define "baton.scratchMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /var/lib/baton}
{{- end -}}

{{/* Where workers read the model. */}}
{{- define "baton.modelPath" -}}
{{- if eq .Values.model.source "image" -}}
/models/baton-tiny
{{- else if eq .Values.model.source "hub" -}}
{{ required "model.hub.id is needed with model.source hub" .Values.model.hub.id }}
{{- else if and (eq .Values.model.source "imageVolume") .Values.model.imageVolume.path -}}
/models/served/{{ trimPrefix "/" .Values.model.imageVolume.path }}
{{- else -}}
/models/served
{{- end -}}
{{- end -}}

{{- define "baton.modelVolume" -}}
{{- if eq .Values.model.source "pvc" }}
- name: model
  persistentVolumeClaim:
    claimName: {{ required "model.pvc.claimName is needed with model.source pvc" .Values.model.pvc.claimName }}
    readOnly: true
{{- else if eq .Values.model.source "imageVolume" }}
- name: model
  image:
    reference: {{ required "model.imageVolume.reference is needed with model.source imageVolume" .Values.model.imageVolume.reference }}
    pullPolicy: {{ .Values.model.imageVolume.pullPolicy }}
{{- end }}
{{- end -}}

{{- define "baton.modelMount" -}}
{{- if eq .Values.model.source "pvc" }}
- name: model
  mountPath: /models/served
  readOnly: true
  {{- with .Values.model.pvc.subPath }}
  subPath: {{ . }}
  {{- end }}
{{- else if eq .Values.model.source "imageVolume" }}
- name: model
  mountPath: /models/served
  readOnly: true
{{- end }}
{{- end -}}

{{- define "baton.hubToken" -}}
{{- if and (eq .Values.model.source "hub") .Values.model.hub.secretName }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .Values.model.hub.secretName }}
      key: {{ .Values.model.hub.secretKey }}
{{- end }}
{{- end -}}

{{/* What cannot work, said by name before anything is installed. */}}
{{- define "baton.check" -}}
{{- if and (eq .Values.router.registry "memory") (or (gt (int .Values.router.replicas) 1) .Values.router.autoscaling.enabled) -}}
{{- fail "router.registry memory is for one router: set router.replicas 1, or registry kubernetes or redis" -}}
{{- end -}}
{{- if and (eq .Values.router.registry "redis") (not (or .Values.redis.enabled .Values.redis.externalUrl .Values.redis.urlSecretName)) -}}
{{- fail "router.registry redis needs redis.enabled, redis.externalUrl or redis.urlSecretName" -}}
{{- end -}}
{{- if and .Values.together.enabled (eq .Values.router.registry "kubernetes") -}}
{{- fail "together.enabled puts two workers into one pod, and registry kubernetes finds one a pod: use redis or memory" -}}
{{- end -}}
{{- if and .Values.together.enabled (or .Values.prefill.enabled .Values.decode.enabled) -}}
{{- fail "together.enabled takes the place of prefill and decode: set prefill.enabled and decode.enabled false" -}}
{{- end -}}
{{- if ne (ternary "1" "0" .Values.prefill.enabled) (ternary "1" "0" .Values.decode.enabled) -}}
{{- fail "prefill and decode workers need each other: enable both or neither" -}}
{{- end -}}
{{- if not (or .Values.prefill.enabled .Values.unified.enabled .Values.together.enabled) -}}
{{- fail "no workers: enable prefill and decode, unified, or together" -}}
{{- end -}}
{{- if and (eq .Values.model.source "imageVolume") (semverCompare "<1.31-0" .Capabilities.KubeVersion.Version) -}}
{{- fail "model.source imageVolume needs Kubernetes 1.31 or later: use pvc or hub" -}}
{{- end -}}
{{- if and .Values.tls.enabled (not .Values.tls.secretName) (not .Values.tls.certManager.enabled) -}}
{{- fail "tls.enabled needs tls.secretName or tls.certManager.enabled" -}}
{{- end -}}
{{- if and .Values.tls.workers.enabled (not .Values.tls.enabled) -}}
{{- fail "tls.workers.enabled needs tls.enabled: a router shows clients and workers one certificate" -}}
{{- end -}}
{{- if and .Values.tls.workers.enabled (not .Values.tls.workers.secretName) (not .Values.tls.certManager.enabled) -}}
{{- fail "tls.workers.enabled needs tls.workers.secretName or tls.certManager.enabled" -}}
{{- end -}}
{{- if and .Values.apiKeys.secretName (not .Values.test.apiKeySecretName) -}}
{{- fail "apiKeys.secretName refuses clients without a key, helm test among them: set test.apiKeySecretName" -}}
{{- end -}}
{{- if and .Values.tls.clientCaSecretName (not .Values.test.clientSecretName) -}}
{{- fail "tls.clientCaSecretName refuses clients without a certificate, helm test among them: set test.clientSecretName" -}}
{{- end -}}
{{- end -}}
